"""Quantises tensors as released models have them: fp8 in blocks, and mxfp4.

Values are computed here from the stored bits, one element at a time. transformers cannot read fp8
whose edge blocks are partial: it takes the shape divided by the number of blocks as their size.
"""

import torch

# Rows and columns of a block. Released models have 128.
FP8_BLOCK = 4
FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}
# Elements of a row that share a scale.
MXFP4_BLOCK = 32
MXFP4_CONFIG = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


def fp8(name, tensor):
    """Returns the stored tensors of a linear layer and their values, or None for other tensors."""
    if not name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
        return None
    rows, columns = tensor.shape
    down, across = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    stored = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(down, across)
    for i in range(down):
        for j in range(across):
            block = (
                slice(i * FP8_BLOCK, (i + 1) * FP8_BLOCK),
                slice(j * FP8_BLOCK, (j + 1) * FP8_BLOCK),
            )
            scales[i, j] = tensor[block].abs().max() / 448
            stored[block] = (tensor[block] / scales[i, j]).to(torch.float8_e4m3fn)
    values = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            values[i, j] = stored[i, j].float() * scales[i // FP8_BLOCK, j // FP8_BLOCK]
    return {name: stored, f"{name}_scale_inv": scales}, values


def e2m1(code):
    """Returns the value of 4 bits: a sign, two of the exponent, one of the mantissa."""
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    value = 0.5 * mantissa if exponent == 0 else (1 + 0.5 * mantissa) * 2 ** (exponent - 1)
    return -value if sign else value


def pack(codes):
    """Returns bytes `[..., 16]` of codes `[..., 32]`. The first code is in the low bits."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def mxfp4_values(blocks, scales):
    """Returns values `[E, in, out]` of blocks `[E, out, in / 32, 16]` and scales."""
    experts, rows, across, half = blocks.shape
    values = torch.empty(experts, across * 2 * half, rows, dtype=torch.float64)
    for e in range(experts):
        for row in range(rows):
            for block in range(across):
                scale = 2.0 ** (int(scales[e, row, block]) - 127)
                for i, byte in enumerate(blocks[e, row, block].tolist()):
                    column = block * 2 * half + 2 * i
                    values[e, column, row] = e2m1(byte & 15) * scale
                    values[e, column + 1, row] = e2m1(byte >> 4) * scale
    values = values.float()
    assert values.isfinite().all()
    return values


def mxfp4(name, tensor):
    """Returns stored tensors of the shape of an expert's stack, and their values.

    They do not approximate the tensor: all 16 codes are drawn, and scales of a usual size. A few
    scales are extreme. The largest would overflow with codes above 1.5, so its block has zeros.
    """
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return None
    experts, columns, rows = tensor.shape
    codes = torch.randint(0, 16, (experts, rows, columns // MXFP4_BLOCK, MXFP4_BLOCK))
    # Those of the first matrix are larger, so that values reach the limit of the clamped GLU.
    usual = (124, 126) if name.endswith("gate_up_proj") else (122, 124)
    scales = torch.randint(usual[0], usual[1] + 1, codes.shape[:-1])
    scales[0, 0, 0], scales[0, 1, 0], scales[1, 2, 0] = 0, 127, 254
    codes[1, 2, 0] &= 8
    assert codes.unique().numel() == 16
    blocks, scales = pack(codes).to(torch.uint8), scales.to(torch.uint8)
    stored = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return stored, mxfp4_values(blocks, scales)


def mxfp4_extremes():
    """Returns blocks with every scale that is special, all codes that stay finite, and values."""
    # Codes up to 1.5 are finite with the largest scale, and up to 3 with the one before.
    rows = [(0, 7), (1, 7), (126, 7), (127, 7), (128, 7), (252, 7), (253, 5), (254, 3)]
    scales = torch.tensor([scale for scale, _ in rows], dtype=torch.uint8).view(1, -1, 1)
    codes = []
    for _, largest in rows:
        finite = [code for code in range(16) if code & 7 <= largest]
        codes.append([finite[i % len(finite)] for i in range(MXFP4_BLOCK)])
    blocks = pack(torch.tensor(codes)).to(torch.uint8).view(1, -1, 1, MXFP4_BLOCK // 2)
    return {
        "down_proj_blocks": blocks,
        "down_proj_scales": scales,
        "down_proj": mxfp4_values(blocks, scales),
    }
