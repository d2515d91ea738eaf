# Generated from chapters/06_vision_transformer.ipynb.
# Edit the notebook, then run "make chapters".
"""Wrong twins from chapter 06, Vision transformer."""

import torch.nn.functional as F

from pgcore.normalization import LayerNorm
from pgcore.vision import MLP, EncoderBlock, MAPHead, PatchEmbedding, VisionTower


class SkipFromTheNorm(EncoderBlock):
    """Saves the norm's output for the skip (C67, C70, C73, C74)."""

    def forward(self, x, mask=None):
        x = self.layer_norm1(x)
        x = x + self.self_attn(x, mask=mask)
        x = self.layer_norm2(x)
        return x + self.mlp(x)


class WithoutFinalNorm(VisionTower):
    """Stops after the last block; the notes name no last norm (C45)."""

    def forward(self, images):
        x = self.patch_embedding(images) + self.positions
        for layer in self.layers:
            x = layer(x)
        return x


class WithoutPositions(VisionTower):
    """Leaves the table out; the notes rightly add it (C43)."""

    def forward(self, images):
        x = self.patch_embedding(images)
        for layer in self.layers:
            x = layer(x)
        return self.post_layernorm(x)


class PositionsAtTheEnd(VisionTower):
    """Adds the table after the blocks, where no token can use it."""

    def forward(self, images):
        x = self.patch_embedding(images)
        for layer in self.layers:
            x = layer(x)
        return self.post_layernorm(x + self.positions)


class ReshapedPatches(PatchEmbedding):
    """Reshapes B D P to B P D where it must transpose."""

    def forward(self, images):
        x = self.conv(images)
        return x.reshape(len(x), -1, x.shape[1])


class ColumnByColumn(PatchEmbedding):
    """Lists the patches down the columns; the table goes along rows."""

    def forward(self, images):
        x = self.conv(images).transpose(2, 3)
        return x.flatten(2).transpose(1, 2)


class ChannelsLastPatches(PatchEmbedding):
    """Cuts patches from a picture of shape R R 3, as PIL and JAX have it.

    The kernel expects channel, row, column; it gets row, column, channel.
    """

    def forward(self, images):
        side = self.patch_size
        x = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))
        x = x.permute(0, 2, 4, 3, 5, 1)  # B rows columns side side C
        x = x.flatten(3).flatten(1, 2)
        return F.linear(x, self.conv.weight.flatten(1), self.conv.bias)


class ExactGELU(MLP):
    """torch's default GELU; the weights were trained with the tanh form."""

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class WithoutNonlinearity(MLP):
    """A list of linear layers (C72): one linear layer in disguise."""

    def forward(self, x):
        return self.fc2(self.fc1(x))


class ScaleByWidth(EncoderBlock):
    """Divides the scores by the root of the model's width (C69)."""

    def __init__(self, width, mlp_dim, **heads):
        super().__init__(width, mlp_dim, **heads)
        self.self_attn.scale = width**-0.5


class LooseEpsilon(EncoderBlock):
    """torch's default epsilon, 1e-5; SigLIP has 1e-6."""

    def __init__(self, width, mlp_dim, **heads):
        super().__init__(width, mlp_dim, **heads)
        self.layer_norm1 = LayerNorm(width, eps=1e-5)
        self.layer_norm2 = LayerNorm(width, eps=1e-5)


class HeadWithoutMLP(MAPHead):
    """Stops at the probe's answer; norm, MLP and their skip are missing."""

    def forward(self, tokens):
        probe = self.probe.expand(len(tokens), -1, -1)
        return self.attention(probe, source=tokens)[:, 0]
