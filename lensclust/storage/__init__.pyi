# Atomic writes, locks, and checked reading of JSON
from .atomic import LOCK as LOCK
from .atomic import created as created
from .atomic import flush as flush
from .atomic import is_vacant as is_vacant
from .atomic import locked as locked
from .atomic import publish as publish
from .atomic import read_json as read_json
from .atomic import remove_partial as remove_partial
from .atomic import replacing as replacing
from .atomic import require_name as require_name
from .atomic import staging as staging
from .atomic import write_atomically as write_atomically
from .atomic import writing as writing

# Integrity: JSON with a checksum, and checksums of a folder's files
from .integrity import DIGESTS as DIGESTS
from .integrity import check_folder as check_folder
from .integrity import difference as difference
from .integrity import digest_of as digest_of
from .integrity import file_digest as file_digest
from .integrity import seal_folder as seal_folder
from .locations import ZARR_2 as ZARR_2

# Locations of a store: a folder, or any URL of fsspec (``s3://bucket/a``)
from .locations import Place as Place
from .locations import as_place as as_place
from .locations import created_atomically as created_atomically
from .locations import is_free as is_free
from .locations import locked_place as locked_place
from .locations import zarr_store as zarr_store

# Safe reading of parquet files from elsewhere
from .parquet import read_frame as read_frame
from .safetensors import read_checksummed as read_checksummed

# Safetensors files with checksums: checkpoints and training states
from .safetensors import read_content as read_content
from .safetensors import save_checksummed as save_checksummed
from .safetensors import tensors_digest as tensors_digest
