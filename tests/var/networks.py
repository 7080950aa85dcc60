"""The networks that golden configs describe, with the weights that the names of their parameters give."""

from tests import goldens
from var.transformer import Transformer, VARArch
from var.vqvae import VQVAE, VQVAEArch


def golden_transformer(config: dict) -> Transformer:
    arch = VARArch(
        depth=config["depth"],
        embed_dim=config["embed_dim"],
        heads=config["num_heads"],
        patch_nums=tuple(config["patch_nums"]),
        num_classes=config["num_classes"],
        vocabulary=config["vocab_size"],
        code_width=config["z_channels"],
        shared_aln=config["shared_aln"],
        attn_l2_norm=config["attn_l2_norm"],
        drop_path=config["drop_path_rate"],
    )
    return goldens.seed_by_name(Transformer(arch))


def golden_vqvae(config: dict) -> VQVAE:
    arch = VQVAEArch(
        patch_nums=tuple(config["patch_nums"]),
        vocab_size=config["vocab_size"],
        z_channels=config["z_channels"],
        ch=config["ch"],
        share_quant_resi=config.get("share_quant_resi", 4),
    )
    return goldens.seed_by_name(VQVAE(arch)).requires_grad_(False).eval()
