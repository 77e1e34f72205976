# Atomic writes, locks, and checked reading of JSON
from .atomic import (
    LOCK as LOCK,
    created as created,
    flush as flush,
    is_vacant as is_vacant,
    locked as locked,
    publish as publish,
    read_json as read_json,
    remove_partial as remove_partial,
    replacing as replacing,
    require_name as require_name,
    staging as staging,
    write_atomically as write_atomically,
    writing as writing,
)

# Integrity: JSON with a checksum, and checksums of a folder's files
from .integrity import (
    DIGESTS as DIGESTS,
    check_folder as check_folder,
    difference as difference,
    digest_of as digest_of,
    file_digest as file_digest,
    seal_folder as seal_folder,
)
from .locations import (
    ZARR_2 as ZARR_2,
    Place as Place,
    as_place as as_place,
    created_atomically as created_atomically,
    is_free as is_free,
    locked_place as locked_place,
    zarr_store as zarr_store,
)

# Safe reading of parquet files from elsewhere
from .parquet import read_frame as read_frame
from .safetensors import (
    read_checksummed as read_checksummed,
    read_content as read_content,
    save_checksummed as save_checksummed,
    tensors_digest as tensors_digest,
)
