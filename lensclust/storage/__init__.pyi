# Files that survive: written whole or not at all, by one process at a time, read with care
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

# One way to notice damage: JSON behind a digest, which holds the digests of files
from .integrity import DIGESTS as DIGESTS
from .integrity import check_folder as check_folder
from .integrity import difference as difference
from .integrity import digest_of as digest_of
from .integrity import file_digest as file_digest
from .integrity import seal_folder as seal_folder
from .locations import ZARR_2 as ZARR_2

# Where a store lies: in a folder, or at any URL that fsspec understands (``s3://bucket/a``)
from .locations import Place as Place
from .locations import as_place as as_place
from .locations import held as held
from .locations import made_whole as made_whole
from .locations import vacant as vacant
from .locations import zarr_store as zarr_store

# Parquet files from elsewhere, read as frames: few bytes that stand for many cost nothing
from .parquet import read_frame as read_frame

# Tensors in a safetensors file that carries its own digests: checkpoints and training states
from .safetensors import read_content as read_content
from .safetensors import read_sealed as read_sealed
from .safetensors import save_sealed as save_sealed
from .safetensors import tensors_digest as tensors_digest
