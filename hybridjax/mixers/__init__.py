"""Token mixers: one file each, behind the contract of `base.py`; the registry of their names."""

from ml_collections import ConfigDict

from hybridjax.config import spec

MIXERS = {
    "attention": "hybridjax.mixers.attention:Attention",
    "gated_deltanet": "hybridjax.mixers.gated_deltanet:GatedDeltaNet",
    "mamba2": "hybridjax.mixers.mamba2:Mamba2",
    "lightning": "hybridjax.mixers.lightning:Lightning",
    "stick_breaking": "hybridjax.mixers.stick_breaking:StickBreaking",
    "moba": "hybridjax.mixers.moba:MoBA",
    "nsa": "hybridjax.mixers.nsa:NSA",
    "landmark": "hybridjax.mixers.landmark:Landmark",
    "chunk_encoder": "hybridjax.mixers.chunk_encoder:ChunkEncoder",
    "retrieval": "hybridjax.mixers.retrieval:Retrieval",
    "hsa": "hybridjax.mixers.hsa:HSA",
    "choice": "hybridjax.mixers.choice:Choice",
}


def mixer(type: str, **options) -> ConfigDict:
    """The spec of a mixer for a config's legend: `mixer("lightning", heads=16, head_dim=128)`.

    `type` is a name of `MIXERS` or `package.module:Class`; the options are the keyword-only
    arguments of that class.
    """
    return spec(type, MIXERS, **options)
