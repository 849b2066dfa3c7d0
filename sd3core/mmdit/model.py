"""MM-DiT: separate weights for text and image that meet in one attention. Paper section 4."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from sd3core.backbone_config import MMDiTConfig
from sd3core.errors import DataError
from sd3core.mmdit.backbone import Backbone
from sd3core.mmdit.layers import JointBlock


class MMDiT(Backbone):
    """MM-DiT of any depth; two streams, or three where `config.clip_tokens` splits the text (paper 5.2.3).

    Three streams: `context_block` is CLIP's, `t5_block` T5's; one `context_embedder` serves both, as with two streams.
    """

    def __init__(self, config: MMDiTConfig):
        super().__init__(config)
        self.joint_blocks = nn.ModuleList(
            JointBlock(
                config.hidden_size,
                config.num_heads,
                config.qk_norm,
                last=i == config.depth - 1,
                dual=i < config.dual_attention_blocks,
                clip_tokens=config.clip_tokens,
            )
            for i in range(config.depth)
        )
        self.init_weights()

    def forward(self, latent: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """The velocity noise - x0, of latent's shape and dtype; see `Backbone` for the arguments.

        Three streams: DataError where the context is shorter than CLIP's part of it.
        """
        clip_tokens = self.config.clip_tokens or 0
        if context.shape[1] < clip_tokens:
            raise DataError(f"a context of {context.shape[1]} tokens is shorter than clip_tokens {clip_tokens}")

        x = self.embed_patches(latent)  # (B, Lx, H)
        c, y = self.embed_conditions(t, context, pooled)  # (B, Lc, H), (B, H)

        for block in self.joint_blocks:
            x, c = block(x, c, y)

        return self.unpatchify(x, y, latent.shape[2]).to(latent.dtype)  # (B, C, h, w)

    def recomputable(self) -> Iterator[nn.Module]:
        yield from self.joint_blocks
