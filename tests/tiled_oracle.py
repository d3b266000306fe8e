"""The tiled layout in numpy, written from its description and not from the library's code."""

import functools

import gguf
import numpy as np

# Those with a code for each weight in place of code words; the same bits in another order.
EXPANDED = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0")
PERMUTED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
PERMUTED += ("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "TQ2_0", "Q1_0", "Q2_0")
FORMATS = PERMUTED + EXPANDED
NATURAL = ("IQ4_NL", "IQ4_XS")
OCTAL = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")


def split(word, width, count):
    """`count` fields of `width` bits of every word, the lowest first, side by side."""
    fields = word[..., None] >> (width * np.arange(count)).astype(word.dtype) & (1 << width) - 1
    return fields.reshape(*word.shape[:-1], -1)


def nibbles(b):
    return np.concatenate([b & 15, b >> 4], axis=-1)


def pairs_of_256(b):
    """64 bytes, each half with four units of bit pairs."""
    half = b.reshape(*b.shape[:-1], 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    return half.reshape(*b.shape[:-1], 256)


def bits_of_256(b):
    """32 bytes, bit u of which is unit u's."""
    return (b[..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(
        *b.shape[:-1], 256
    )


def nibbles_of_256(b):
    return nibbles(b.reshape(*b.shape[:-1], 4, 32)).reshape(*b.shape[:-1], 256)


def k_scales(b):
    """Scales and minima [..., 8] of the 12 bytes of Q4_K and Q5_K."""
    low, middle, high = b[..., :4], b[..., 4:8], b[..., 8:]
    scale = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=-1)
    minimum = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=-1)
    return scale, minimum


def q3_scales(b):
    low = nibbles(b[..., :8])
    high = (b[..., None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3).reshape(
        *b.shape[:-1], 16
    )
    return low | high << 4


def iq4_xs_scales(b):
    high = b[..., 2:4].copy().view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    return split(b[..., 4:8], 4, 2) | high.astype(np.uint8) << 4


def words(b, dtype):
    return np.ascontiguousarray(b).view(dtype)


def pack_bits(value, count):
    """Bytes [..., n * count / 8] of fields [..., n] of `count` bits, the first in the lowest."""
    bits = value[..., None].astype(np.uint32) >> np.arange(count, dtype=np.uint32) & 1
    flat = bits.astype(np.uint8).reshape(*value.shape[:-1], -1)
    return np.packbits(flat, axis=-1, bitorder="little")


@functools.cache
def grid(name):
    """Places of a code word's values among all that the format has, [code words, 8 or 4]."""
    quant = getattr(gguf.quants, {"IQ1_M": "IQ1_S"}.get(name, name))
    quant.init_grid()
    values = quant.grid.reshape(*quant.grid.shape[-2:])
    return np.searchsorted(np.unique(values), values).astype(np.uint8)


def seven_signs(packed):
    """Signs [..., 8 n] of n fields of seven bits; every eight of them are set an even number of
    times."""
    sevens = split(packed, 1, 7).astype(np.uint8).reshape(*packed.shape, 7)
    signs = np.concatenate([sevens, np.bitwise_xor.reduce(sevens, -1, keepdims=True)], axis=-1)
    return signs.reshape(*packed.shape[:-1], -1)


def unit_words(word):
    """Four fields of seven bits and one of four of words [..., 8]."""
    return seven_signs(split(word, 7, 4)), word >> 28


def code_words_of(name, b):
    """Of an IQ1, IQ2 or IQ3 format: indices, signs [..., 256], and scales [..., 8 or 16]."""
    match name:
        case "IQ1_S":
            high = words(b[..., 34:], "<u2")
            index = b[..., 2:34] | split(high, 3, 4).astype(np.uint16) << 8
            return index, None, high >> 12 & 7
        case "IQ1_M":
            index = b[..., :32] | (split(b[..., 32:48], 4, 2) & 7).astype(np.uint16) << 8
            return index, None, split(words(b[..., 48:], "<u2"), 3, 4)
        case "IQ2_XXS":
            pair = words(b[..., 2:], "<u4").reshape(*b.shape[:-1], 8, 2)
            signs, scales = unit_words(pair[..., 1])
            return split(pair[..., 0], 8, 4), signs, scales
        case "IQ2_XS":
            code = words(b[..., 2:66], "<u2")
            return code & 511, seven_signs(code >> 9), split(b[..., 66:], 4, 2)
        case "IQ2_S":
            index = b[..., 2:34] | split(b[..., 66:74], 2, 4).astype(np.uint16) << 8
            return index, split(b[..., 34:66], 1, 8), split(b[..., 74:], 4, 2)
        case "IQ3_XXS":
            signs, scales = unit_words(words(b[..., 66:], "<u4"))
            return b[..., 2:66], signs, scales
        case "IQ3_S":
            index = b[..., 2:66] | split(b[..., 66:74], 1, 8).astype(np.uint16) << 8
            return index, split(b[..., 74:106], 1, 8), split(b[..., 106:], 4, 2)
    raise AssertionError(name)


def iq1_m_d(b):
    return words(pack_bits(words(b[..., 48:], "<u2") >> 12, 4), "<u2")


def expanded_fields(name, b):
    """As `fields`, of the formats with code words."""
    index, signs, scales = code_words_of(name, b)
    value = grid(name)[index].reshape(*b.shape[:-1], 256)
    nibbles = pack_bits(scales, 4)
    match name:
        case "IQ1_S":
            shift = words(b[..., 34:], "<u2") >> 15
            return value, None, [pack_bits(scales | shift << 3, 4), b[..., :2]]
        case "IQ1_M":
            pair = scales.reshape(*b.shape[:-1], 8, 2)
            shift = (split(b[..., 32:48], 4, 2) >> 3).reshape(*b.shape[:-1], 8, 4)
            ten = pair[..., 0] | pair[..., 1] << 3 | pack_bits(shift, 1)[..., 0].astype("<u2") << 6
            ten = pack_bits(ten[..., [0, 4, 1, 5, 2, 6, 3, 7]], 10)
            return value, None, [np.concatenate([ten, iq1_m_d(b).view(np.uint8)], axis=-1)]
        case "IQ2_XXS":
            return value | signs << 2, None, [nibbles, b[..., :2]]
        case "IQ2_XS" | "IQ2_S":
            return value | signs << 2, nibbles[..., None], [b[..., :2]]
        case "IQ3_XXS":
            return value | signs << 3, None, [nibbles, b[..., :2]]
        case "IQ3_S":
            return np.where(signs, 7 - value, 8 + value), None, [nibbles, b[..., :2]]
    raise AssertionError(name)


def tq1_0_fields(b):
    digits, rest = [], b[..., :52].astype(np.uint16)
    for _ in range(5):
        digits.append((rest * 3 >> 8).astype(np.uint8))
        rest = rest * 3 & 255
    places = ((0, 32, 5), (32, 48, 5), (48, 52, 4))
    q = [digits[n][..., first:end] for first, end, count in places for n in range(count)]
    # The five digits of a byte, and the least byte that has them.
    value = sum(digit.astype(np.int32) * 3 ** (4 - n) for n, digit in enumerate(digits))
    rest = (b[..., :52] - np.ceil(value * 256 / 243)).astype(np.uint8)
    last = pack_bits(digits[4][..., 48:] | rest[..., 48:] << 2, 4)
    row = np.concatenate([pack_bits(rest[..., :48], 1), last], axis=-1)
    return np.concatenate(q, axis=-1), None, [b[..., 52:], row]


def fields(name, b):
    """Of blocks [..., block_bytes]: codes [..., block_size], and what goes with units and rows."""
    match name:
        case "Q4_0" | "IQ4_NL":
            return nibbles(b[..., 2:]), b[..., None, :2], []
        case "Q4_1":
            return nibbles(b[..., 4:]), b[..., None, :4], []
        case "Q5_0" | "Q5_1":
            n = 2 if name == "Q5_0" else 4
            q = nibbles(b[..., n + 4 :]) | split(b[..., n : n + 4], 1, 8) << 4
            return q, b[..., None, :n], []
        case "Q8_0":
            return b[..., 2:], b[..., None, :2], []
        case "MXFP4":
            return nibbles(b[..., 1:]), b[..., None, :1], []
        case "NVFP4":
            groups = b[..., 4:].reshape(*b.shape[:-1], 4, 8)
            scales = b[..., :4].reshape(*b.shape[:-1], 2, 2)
            return nibbles(groups).reshape(*b.shape[:-1], 64), scales, []
        case "Q2_K":
            scales = b[..., :16].reshape(*b.shape[:-1], 8, 2)
            return pairs_of_256(b[..., 16:80]), scales, [b[..., 80:]]
        case "Q3_K":
            q = pairs_of_256(b[..., 32:96]) | bits_of_256(b[..., :32]) << 2
            s = q3_scales(b[..., 96:108])
            t = [s[..., [2 * t, 2 * t + 1, 8 + 2 * t, 9 + 2 * t]] for t in range(4)]
            return q, None, [pack_bits(np.concatenate(t, axis=-1), 6), b[..., 108:]]
        case "Q4_K" | "Q5_K":
            s, m = k_scales(b[..., 4:16])
            t = [x[..., [i]] for t in range(4) for i in (t, 4 + t) for x in (s, m)]
            row = np.concatenate([b[..., :4], pack_bits(np.concatenate(t, axis=-1), 6)], axis=-1)
            if name == "Q4_K":
                return nibbles_of_256(b[..., 16:]), None, [row]
            return nibbles_of_256(b[..., 48:]) | bits_of_256(b[..., 16:48]) << 4, None, [row]
        case "Q6_K":
            low = nibbles(b[..., :128].reshape(*b.shape[:-1], 2, 64)).reshape(*b.shape[:-1], 256)
            scales = b[..., 192:208].reshape(*b.shape[:-1], 8, 2)
            return low | pairs_of_256(b[..., 128:192]) << 4, scales, [b[..., 208:]]
        case "IQ4_XS":
            q = nibbles(b[..., 8:].reshape(*b.shape[:-1], 8, 16)).reshape(*b.shape[:-1], 256)
            s = iq4_xs_scales(b)[..., [0, 4, 1, 5, 2, 6, 3, 7]]
            return q, None, [np.concatenate([b[..., :2], pack_bits(s, 6)], axis=-1)]
        case "TQ1_0":
            return tq1_0_fields(b)
        case "TQ2_0":
            return pairs_of_256(b[..., :64]), None, [b[..., 64:]]
        case "Q1_0":
            return split(b[..., 2:], 1, 8), None, [b[..., :2]]
        case "Q2_0":
            return split(b[..., 2:], 2, 4), b[..., :2, None], []
    return expanded_fields(name, b)


def e2m1_words(pair):
    """Pairs [..., 16, 2] of codes seem; a byte of a word's half is seem of one and SEEM of another:
    sEEMeemS."""
    byte = pair.reshape(*pair.shape[:-2], 4, 2, 2, 2)  # [..., word, second, low, h]
    first, second = byte[..., 0, :, :], byte[..., 1, :, :]
    byte = (first >> 3) << 7 | (second & 7) << 4 | (first & 7) << 1 | second >> 3
    half = byte[..., 0, :] << 8 | byte[..., 1, :]
    return half[..., 0] | half[..., 1] << 16


def octal_words(name, q):
    """Codes of three bits in nibbles: 24 of them, and the other eight on top of these; or all 32,
    and on top fourth bits, in a byte that of a word's second four weights before the first four's."""
    if name == "IQ3_XXS":
        low = (q & 7).reshape(*q.shape[:-1], 4, 8)
        fours = (q >> 3).reshape(*q.shape[:-1], 4, 2, 4)
        top = np.swapaxes(fours[..., ::-1, :], -1, -2).reshape(low.shape)
    else:
        low = q[..., :24].reshape(*q.shape[:-1], 3, 8)
        top = q[..., None, 24:] >> np.arange(3, dtype=np.uint32)[:, None] & 1
    nibble = low | top << 3
    return (nibble << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32)


def code_words(name, q):
    """Words [..., n] of units' codes [..., 32]; word j bit 16 h + b is a bit of q[2i + h]."""
    q = q.astype(np.uint32)
    if name == "Q8_0":
        return (q.reshape(*q.shape[:-1], 8, 4) << np.arange(0, 32, 8, dtype=np.uint32)).sum(-1)
    if name in NATURAL:
        return (q.reshape(*q.shape[:-1], 4, 8) << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1)
    pair = q.reshape(*q.shape[:-1], 16, 2)  # [..., i, h]
    if name in ("MXFP4", "NVFP4"):
        return e2m1_words(pair)
    if name in OCTAL:
        return octal_words(name, q)
    halves = {
        1: lambda j: [(m, m, 0, 1) for m in range(16)],
        2: lambda j: [(8 * j + m, 2 * m, 0, 2) for m in range(8)],
        3: lambda j: [(5 * j + m, 3 * m, 0, 3) for m in range(5)] + [(15, 15, j, 1)],
        4: lambda j: [(4 * j + m, 4 * m, 0, 4) for m in range(4)],
        5: lambda j: [(3 * j + m, 5 * m, 0, 5) for m in range(3)] + [(15, 15, j, 1)],
        6: lambda j: [
            (8 * (j // 3) + i, at, first, count)
            for i, at, first, count in (
                [(0, 10, 0, 6), (1, 4, 0, 6), (6, 0, 0, 4)],
                [(2, 10, 0, 6), (3, 4, 0, 6), (6, 0, 4, 2), (7, 2, 4, 2)],
                [(4, 10, 0, 6), (5, 4, 0, 6), (7, 0, 0, 4)],
            )[j % 3]
        ],
    }
    bits = {"Q1_0": 1, "Q3_K": 3, "Q6_K": 6} | dict.fromkeys(TWO_BITS, 2)
    bits = bits.get(name, 5 if name.startswith("Q5") else 4)
    words = []
    for j in range(bits):
        half = 0
        for i, at, first, count in halves[bits](j):
            half = half | (pair[..., i, :] >> first & (1 << count) - 1) << at
        words.append(half[..., 0] | half[..., 1] << 16)
    return np.stack(words, axis=-1)


TWO_BITS = ("Q2_K", "TQ1_0", "TQ2_0", "Q2_0", "IQ1_S", "IQ1_M")
UNIT_WIDTHS = {"Q1_0": (4,), "Q8_0": (16, 16), "Q6_K": (16, 8)}
UNIT_WIDTHS |= dict.fromkeys(TWO_BITS, (8,))
UNIT_WIDTHS |= dict.fromkeys(("Q3_K", "IQ2_XXS", "IQ2_XS", "IQ2_S"), (8, 4))
UNIT_WIDTHS |= dict.fromkeys(("Q5_0", "Q5_1", "Q5_K"), (16, 4))


def tile(name, data, block_bytes):
    """Tiled bytes of GGUF rows [E, N, row_bytes]."""
    row_bytes = data.shape[-1]
    out = []
    for band in data.reshape(-1, 16, row_bytes // block_bytes, block_bytes):
        q, scales, rows = fields(name, band)
        units = q.size // 16 // 32
        words = code_words(name, q.reshape(16, units, 32)).astype("<u4")
        code = np.ascontiguousarray(words).view(np.uint8)
        widths = UNIT_WIDTHS.get(name, (16,))
        planes = np.split(code, np.cumsum(widths)[:-1], axis=-1)
        if scales is not None:
            planes.append(scales.reshape(16, units, -1))
        atom = 8 if q.shape[-1] == 256 else 4
        for first in range(0, units, atom):
            for plane in planes:
                for chunk in range(first, min(first + atom, units), 4):
                    out.append(plane[:, chunk : chunk + 4].tobytes())
            out += [row[:, first // atom].tobytes() for row in rows]
    tiled = np.frombuffer(b"".join(out), np.uint8)
    return tiled.reshape(*data.shape[:-1], tiled.size // (data.size // row_bytes))


def half(b):
    return np.ascontiguousarray(b).view(np.float16).astype(np.float32)


def affine(name, b):
    """Scales and offsets, float32, of blocks' groups."""
    zero = np.zeros(1, np.float32)
    match name:
        case "Q4_0" | "IQ4_NL" | "Q5_0" | "Q8_0":
            return half(b[..., :2]), zero
        case "Q4_1" | "Q5_1":
            return half(b[..., :2]), half(b[..., 2:4])
        case "MXFP4":
            return np.ldexp(np.float32(1), b[..., :1].astype(int) - 128), zero
        case "NVFP4":
            code = b[..., :4]
            e, m = (code >> 3 & 15).astype(int), (code & 7).astype(np.float32)
            value = np.where(e > 0, np.ldexp(1 + m / 8, e - 8), m * np.float32(2**-10))
            return np.where(code == 0x7F, np.float32(0), value.astype(np.float32)), zero
        case "Q2_K":
            return half(b[..., 80:82]) * (b[..., :16] & 15), half(b[..., 82:]) * (b[..., :16] >> 4)
        case "Q3_K":
            return half(b[..., 108:]) * (q3_scales(b[..., 96:108]).astype(np.float32) - 32), zero
        case "Q4_K" | "Q5_K":
            s, m = k_scales(b[..., 4:16])
            return half(b[..., :2]) * s, half(b[..., 2:4]) * m
        case "Q6_K":
            return half(b[..., 208:]) * b[..., 192:208].view(np.int8), zero
        case "IQ4_XS":
            return half(b[..., :2]) * (iq4_xs_scales(b).astype(np.float32) - 32), zero
        case "Q1_0" | "Q2_0":
            return half(b[..., :2]), zero
        case "TQ1_0" | "TQ2_0":
            return half(b[..., -2:]), zero
    # Of values that are integers: eighths in IQ1, whose scales count odd numbers of them.
    scale = code_words_of(name, b)[2].astype(np.float32)
    d = half(iq1_m_d(b)) if name == "IQ1_M" else half(b[..., :2])
    step, first = {"IQ1": (1 / 4, 1 / 8), "IQ2": (1 / 4, 1 / 8), "IQ3": (1 / 2, 1 / 4)}[name[:3]]
    if name == "IQ3_S":
        step, first = 2, 1
    return d * (np.float32(step) * scale + np.float32(first)), zero


def aux(name, data, block_bytes, weights):
    """aux [E, N, 2] of GGUF rows [E, N, row_bytes] whose values are weights [E, N, K]."""
    blocks = data.reshape(*data.shape[:2], -1, block_bytes)
    with np.errstate(invalid="ignore", over="ignore"):
        scale, offset = (np.abs(part) for part in affine(name, blocks))
        finite = np.ones(data.shape[:2], bool)
        for part in (scale, offset):
            if part.ndim > 2:
                finite &= np.isfinite(part).all(axis=(2, 3))
        largest = np.maximum(scale, offset / 256).reshape(*data.shape[:2], -1).max(axis=-1)
    usable = np.where(finite & (largest > 0), largest, 1).astype(np.float64)
    exponent = np.clip(np.floor(np.log2(usable)) + 10, -100, 100)
    r = np.where(largest > 0, 2.0**exponent, 1)
    norms = np.linalg.norm(np.where(finite[..., None], weights, 0).astype(np.float64), axis=-1)
    bound = np.minimum(1.001 * norms.max(axis=1, keepdims=True), 3.4e38)
    bound = np.broadcast_to(bound, r.shape)
    return np.stack([np.where(finite, r, np.nan), bound], axis=-1).astype(np.float32)
