"""Quantized tensors, made element by element and without tva, and what they stand for in float64."""

import json
import math

import torch

NF4 = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fp8(name, w, block=4):
    rows, columns = w.shape
    codes, scales = torch.empty(w.shape), torch.empty(-(-rows // block), -(-columns // block))
    exact = torch.empty_like(w)
    for i in range(0, rows, block):
        for j in range(0, columns, block):
            part = w[i : i + block, j : j + block]
            scale = (part.abs().max() / 448).float()
            scales[i // block, j // block] = scale
            codes[i : i + block, j : j + block] = part / scale.double()
            rounded = (part / scale.double()).float().to(torch.float8_e4m3fn)
            exact[i : i + block, j : j + block] = rounded.double() * scale.double()
    return {f"{name}.weight": codes.to(torch.float8_e4m3fn), f"{name}.weight_scale_inv": scales}, exact


def fp8_rows(name, w):
    scales = (w.abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    codes = (w / scales.double()).clamp(-448, 448).float().to(torch.float8_e4m3fn)
    stored = {f"{name}.weight": codes, f"{name}.weight_scale": scales, f"{name}.input_scale": torch.ones(1)}
    return stored, codes.double() * scales.double()


def int8(name, w):
    largest = w.abs().amax(1).float()
    codes = (w / largest.double()[:, None] * 127).round().to(torch.int8)
    stored = {f"{name}.weight": codes, f"{name}.SCB": largest, f"{name}.weight_format": torch.tensor(0).byte()}
    return stored, codes.double() * (largest.double()[:, None] / 127)


def nf4(name, w, block=8, nested=False):
    table, flat = torch.tensor(NF4), w.reshape(-1).tolist()
    absmax = [max(map(abs, flat[i : i + block])) for i in range(0, len(flat), block)]
    state = {"quant_type": "nf4", "blocksize": block, "shape": list(w.shape), "dtype": "bfloat16"}
    stored = {}
    if nested:
        offset = sum(absmax) / len(absmax)
        largest = max(abs(value - offset) for value in absmax)
        nested_table = torch.linspace(-1, 1, 256)
        chosen = [round((value - offset) / largest * 127.5 + 127.5) for value in absmax]
        state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
        stored[f"{name}.weight.nested_absmax"] = torch.tensor([largest])
        stored[f"{name}.weight.nested_quant_map"] = nested_table
        stored[f"{name}.weight.absmax"] = torch.tensor(chosen, dtype=torch.uint8)
        largest = torch.tensor(largest).item()  # as float32 keeps it
        absmax = [nested_table[code].item() * largest + offset for code in chosen]
    else:
        stored[f"{name}.weight.absmax"] = torch.tensor(absmax)
        absmax = torch.tensor(absmax).tolist()
    steps = table.tolist()
    codes = [min(range(16), key=lambda k, v=v, i=i: abs(steps[k] * absmax[i // block] - v)) for i, v in enumerate(flat)]
    exact = torch.tensor([steps[c] * absmax[i // block] for i, c in enumerate(codes)], dtype=torch.float64)
    packed = [a << 4 | b for a, b in zip(codes[0::2], [*codes[1::2], 0], strict=False)]
    stored[f"{name}.weight"] = torch.tensor(packed, dtype=torch.uint8)[:, None]
    stored[f"{name}.weight.quant_map"] = table
    text = json.dumps(state).encode()
    stored[f"{name}.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    return stored, exact.reshape(w.shape)


def mxfp4(name, w):
    """Experts of shape [expert, in, out], which are stored as [expert, out, in / 32, 16 bytes]."""
    experts, inputs, outputs = w.shape
    blocks = torch.zeros(experts, outputs, inputs // 32, 16, dtype=torch.uint8)
    scales = torch.zeros(experts, outputs, inputs // 32, dtype=torch.uint8)
    exact = torch.empty_like(w)
    for e in range(experts):
        for o in range(outputs):
            for g in range(inputs // 32):
                group = w[e, g * 32 : g * 32 + 32, o].tolist()
                exponent = math.frexp(max(map(abs, group)))[1] - 3
                scales[e, o, g] = exponent + 127
                for k, value in enumerate(group):
                    code = min(range(8), key=lambda c, v=value, x=exponent: abs(FP4[c] * 2.0**x - abs(v)))
                    blocks[e, o, g, k // 2] |= (code | (8 if value < 0 else 0)) << 4 * (k % 2)
                    exact[e, g * 32 + k, o] = math.copysign(FP4[code] * 2.0**exponent, value)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, exact


def pack(codes, bits, order=None):
    """Pack integers along the last dimension into words of 32 bits."""
    count = 32 // bits
    words = torch.zeros(*codes.shape[:-1], codes.shape[-1] // count, dtype=torch.int64)
    for k in range(codes.shape[-1]):
        place = (order or range(count))[k % count]
        words[..., k // count] |= codes[..., k].long() << bits * place
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def grouped(w, group, bits=4):
    """Asymmetric codes of [out, in] in groups of inputs: codes [in, out], zeros and scales [groups, out]."""
    columns = w.T.reshape(-1, group, w.shape[0])
    low, high = columns.amin(1), columns.amax(1)
    scales = ((high - low) / (2**bits - 1)).half()
    zeros = (-low / scales.double()).round().clamp(0, 2**bits - 1)
    wide_scales, wide_zeros = (x.double().repeat_interleave(group, 0) for x in (scales, zeros))
    codes = (w.T / wide_scales + wide_zeros).round().clamp(0, 2**bits - 1)
    return codes.int(), zeros.int(), scales, ((codes - wide_zeros) * wide_scales).T


def awq(name, w, group=8):
    codes, zeros, scales, exact = grouped(w, group)
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    stored = {"qweight": pack(codes, 4, order), "qzeros": pack(zeros, 4, order), "scales": scales}
    return {f"{name}.{key}": tensor for key, tensor in stored.items()}, exact


def gptq(name, w, group=8):
    w = w - w[:, :group].amin() * (torch.arange(w.shape[1]) < group)  # one group whose zeros are 0
    codes, zeros, scales, exact = grouped(w, group)
    stored = {"qweight": pack(codes.T, 4).T.contiguous(), "qzeros": pack(zeros - 1 & 15, 4), "scales": scales}
    assert bool((zeros == 0).any())
    stored["g_idx"] = (torch.arange(w.shape[1]) // group).int()
    return {f"{name}.{key}": tensor for key, tensor in stored.items()}, exact


def packed_rows(name, w, group=8):
    parts = w.reshape(w.shape[0], -1, group)
    scales = (parts.abs().amax(2) / 7.5).to(torch.bfloat16)
    codes = (parts / scales.double()[..., None]).round().clamp(-8, 7)
    exact = (codes * scales.double()[..., None]).reshape(w.shape)
    stored = {"weight_packed": pack((codes + 8).reshape(w.shape).int(), 4), "weight_scale": scales}
    stored["weight_shape"] = torch.tensor(w.shape)
    return {f"{name}.{key}": tensor for key, tensor in stored.items()}, exact


CT = {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 8, "symmetric": True}}}}
MAKERS = {  # scheme: how a tensor is quantized, shape of the weights, what config.json says
    "FP8 blocks": (fp8, (10, 14), {"quant_method": "fp8", "weight_block_size": [4, 4]}),
    "FP8 rows": (fp8_rows, (6, 5), {"quant_method": "compressed-tensors"}),
    "int8": (int8, (6, 5), {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "nf4": (nf4, (5, 7), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "nf4 nested": (lambda n, w: nf4(n, w, nested=True), (5, 7), {"quant_method": "bitsandbytes"}),
    "MXFP4": (mxfp4, (2, 64, 3), {"quant_method": "mxfp4"}),
    "AWQ": (awq, (8, 16), {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}),
    "GPTQ": (gptq, (8, 16), {"quant_method": "gptq", "bits": 4, "group_size": 8}),
    "compressed-tensors": (packed_rows, (6, 16), {"quant_method": "compressed-tensors", **CT}),
}


def tensor_name(scheme):
    return "l.experts" if scheme == "MXFP4" else "l.weight"
