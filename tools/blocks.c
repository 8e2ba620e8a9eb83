/* Blocks of ggml's quant types, taken apart and put together again: formats as in ggml-common.h. */

#include "blocks.h"

#include <string.h>

static uint16_t load16(const uint8_t *from) { return (uint16_t)(from[0] | from[1] << 8); }

static void store16(uint8_t *to, uint16_t value) {
    to[0] = (uint8_t)value;
    to[1] = (uint8_t)(value >> 8);
}

/* Place of weight `i` of a 32-block among 16 bytes, and the shift of its 4 bits. */
static int nibble(const uint8_t *from, int i) { return from[i % 16] >> (i / 16 * 4) & 15; }

static void set_nibble(uint8_t *to, int i, int code) { to[i % 16] |= (uint8_t)(code << i / 16 * 4); }

/* -- blocks of 32: d, [m], [fifth bits], codes -- */

static void unpack_32(const uint8_t *from, struct block *to, bool has_m, bool has_fifth, int low) {
    to->d = load16(from);
    to->m = has_m ? load16(from + 2) : 0;
    to->scales[0] = 1;
    to->mins[0] = has_m;
    from += has_m ? 4 : 2;
    const uint8_t *fifth = from;
    from += has_fifth ? 4 : 0;
    for (int i = 0; i < 32; i++) {
        int high = has_fifth ? fifth[i / 8] >> i % 8 & 1 : 0;
        to->codes[i] = (int8_t)((nibble(from, i) | high << 4) + low);
    }
}

static void pack_32(const struct block *from, uint8_t *to, bool has_m, bool has_fifth, int low) {
    store16(to, from->d);
    if (has_m) {
        store16(to + 2, from->m);
    }
    to += has_m ? 4 : 2;
    uint8_t *fifth = to;
    to += has_fifth ? 4 : 0;
    memset(fifth, 0, (has_fifth ? 4 : 0) + 16);
    for (int i = 0; i < 32; i++) {
        int code = from->codes[i] - low;
        set_nibble(to, i, code & 15);
        if (has_fifth) {
            fifth[i / 8] |= (uint8_t)((code >> 4) << i % 8);
        }
    }
}

#define BLOCK_OF_32(name, has_m, has_fifth, low)                                                   \
    static void unpack_##name(const uint8_t *from, struct block *to) {                             \
        unpack_32(from, to, has_m, has_fifth, low);                                                \
    }                                                                                              \
    static void pack_##name(const struct block *from, uint8_t *to) {                               \
        pack_32(from, to, has_m, has_fifth, low);                                                  \
    }

BLOCK_OF_32(q4_0, false, false, -8)
BLOCK_OF_32(q4_1, true, false, 0)
BLOCK_OF_32(q5_0, false, true, -16)
BLOCK_OF_32(q5_1, true, true, 0)
BLOCK_OF_32(iq4_nl, false, false, 0)

static void unpack_q8_0(const uint8_t *from, struct block *to) {
    to->d = load16(from);
    to->scales[0] = 1;
    memcpy(to->codes, from + 2, 32);
}

static void pack_q8_0(const struct block *from, uint8_t *to) {
    store16(to, from->d);
    memcpy(to + 2, from->codes, 32);
}

/* -- blocks of 256 -- */

/* Bits of weight `i` where four weights share a byte, 32 bytes for 128 weights (Q2_K, Q3_K). */
static int pair_place(int i) { return i / 128 * 32 + i % 32; }
static int pair_shift(int i) { return i % 128 / 32 * 2; }

static void unpack_q2_k(const uint8_t *from, struct block *to) {
    for (int j = 0; j < 16; j++) {
        to->scales[j] = from[j] & 15;
        to->mins[j] = (int16_t) - (from[j] >> 4);
    }
    for (int i = 0; i < 256; i++) {
        to->codes[i] = (int8_t)(from[16 + pair_place(i)] >> pair_shift(i) & 3);
    }
    to->d = load16(from + 80);
    to->m = load16(from + 82);
}

static void pack_q2_k(const struct block *from, uint8_t *to) {
    memset(to, 0, 80);
    for (int j = 0; j < 16; j++) {
        to[j] = (uint8_t)(from->scales[j] | -from->mins[j] << 4);
    }
    for (int i = 0; i < 256; i++) {
        to[16 + pair_place(i)] |= (uint8_t)(from->codes[i] << pair_shift(i));
    }
    store16(to + 80, from->d);
    store16(to + 82, from->m);
}

static void unpack_q3_k(const uint8_t *from, struct block *to) {
    const uint8_t *scales = from + 96;
    for (int j = 0; j < 16; j++) {
        int low = scales[j % 8] >> j / 8 * 4 & 15, high = scales[8 + j % 4] >> j / 4 * 2 & 3;
        to->scales[j] = (int16_t)((low | high << 4) - 32);
    }
    for (int i = 0; i < 256; i++) {
        int low = from[32 + pair_place(i)] >> pair_shift(i) & 3, high = from[i % 32] >> i / 32 & 1;
        to->codes[i] = (int8_t)((low | high << 2) - 4);
    }
    to->d = load16(from + 108);
}

static void pack_q3_k(const struct block *from, uint8_t *to) {
    memset(to, 0, 108);
    for (int j = 0; j < 16; j++) {
        int scale = from->scales[j] + 32;
        to[96 + j % 8] |= (uint8_t)((scale & 15) << j / 8 * 4);
        to[104 + j % 4] |= (uint8_t)((scale >> 4) << j / 4 * 2);
    }
    for (int i = 0; i < 256; i++) {
        int code = from->codes[i] + 4;
        to[32 + pair_place(i)] |= (uint8_t)((code & 3) << pair_shift(i));
        to[i % 32] |= (uint8_t)((code >> 2) << i / 32);
    }
    store16(to + 108, from->d);
}

/* The 6-bit scales and minima of Q4_K and Q5_K, in 12 bytes. */
static void unpack_scales(const uint8_t *from, struct block *to) {
    for (int j = 0; j < 8; j++) {
        int high = j < 4 ? 0 : j - 4;
        int scale = j < 4 ? from[j] & 63 : (from[j + 4] & 15) | from[high] >> 6 << 4;
        int min = j < 4 ? from[j + 4] & 63 : from[j + 4] >> 4 | from[j] >> 6 << 4;
        to->scales[j] = (int16_t)scale;
        to->mins[j] = (int16_t)-min;
    }
}

static void pack_scales(const struct block *from, uint8_t *to) {
    memset(to, 0, 12);
    for (int j = 0; j < 8; j++) {
        int scale = from->scales[j], min = -from->mins[j];
        if (j < 4) {
            to[j] |= (uint8_t)scale;
            to[j + 4] |= (uint8_t)min;
        } else {
            to[j + 4] = (uint8_t)((scale & 15) | (min & 15) << 4);
            to[j - 4] |= (uint8_t)(scale >> 4 << 6);
            to[j] |= (uint8_t)(min >> 4 << 6);
        }
    }
}

/* Q4_K, and with a fifth bit Q5_K: 64 weights share 32 bytes. */
static void unpack_45_k(const uint8_t *from, struct block *to, bool has_fifth) {
    to->d = load16(from);
    to->m = load16(from + 2);
    unpack_scales(from + 4, to);
    const uint8_t *fifth = from + 16, *codes = from + (has_fifth ? 48 : 16);
    for (int i = 0; i < 256; i++) {
        int low = codes[i / 64 * 32 + i % 32] >> i % 64 / 32 * 4 & 15;
        int high = has_fifth ? fifth[i % 32] >> i / 32 & 1 : 0;
        to->codes[i] = (int8_t)(low | high << 4);
    }
}

static void pack_45_k(const struct block *from, uint8_t *to, bool has_fifth) {
    store16(to, from->d);
    store16(to + 2, from->m);
    pack_scales(from, to + 4);
    uint8_t *fifth = to + 16, *codes = to + (has_fifth ? 48 : 16);
    memset(fifth, 0, has_fifth ? 160 : 128);
    for (int i = 0; i < 256; i++) {
        codes[i / 64 * 32 + i % 32] |= (uint8_t)((from->codes[i] & 15) << i % 64 / 32 * 4);
        if (has_fifth) {
            fifth[i % 32] |= (uint8_t)(from->codes[i] >> 4 << i / 32);
        }
    }
}

static void unpack_q4_k(const uint8_t *from, struct block *to) { unpack_45_k(from, to, false); }
static void pack_q4_k(const struct block *from, uint8_t *to) { pack_45_k(from, to, false); }
static void unpack_q5_k(const uint8_t *from, struct block *to) { unpack_45_k(from, to, true); }
static void pack_q5_k(const struct block *from, uint8_t *to) { pack_45_k(from, to, true); }

/* Where weight `i` of a Q6_K block has its low four and its high two bits. */
static int q6_low(int i) { return i / 128 * 64 + i % 64; }
static int q6_high(int i) { return 128 + i / 128 * 32 + i % 32; }

static void unpack_q6_k(const uint8_t *from, struct block *to) {
    for (int i = 0; i < 256; i++) {
        int low = from[q6_low(i)] >> i % 128 / 64 * 4 & 15;
        int high = from[q6_high(i)] >> i % 128 / 32 * 2 & 3;
        to->codes[i] = (int8_t)((low | high << 4) - 32);
    }
    for (int j = 0; j < 16; j++) {
        to->scales[j] = (int8_t)from[192 + j];
    }
    to->d = load16(from + 208);
}

static void pack_q6_k(const struct block *from, uint8_t *to) {
    memset(to, 0, 192);
    for (int i = 0; i < 256; i++) {
        int code = from->codes[i] + 32;
        to[q6_low(i)] |= (uint8_t)((code & 15) << i % 128 / 64 * 4);
        to[q6_high(i)] |= (uint8_t)((code >> 4) << i % 128 / 32 * 2);
    }
    for (int j = 0; j < 16; j++) {
        to[192 + j] = (uint8_t)from->scales[j];
    }
    store16(to + 208, from->d);
}

static void unpack_iq4_xs(const uint8_t *from, struct block *to) {
    uint16_t high = load16(from + 2);
    to->d = load16(from);
    for (int j = 0; j < 8; j++) {
        to->scales[j] = (int16_t)(((from[4 + j / 2] >> j % 2 * 4 & 15) | (high >> 2 * j & 3) << 4) - 32);
    }
    for (int i = 0; i < 256; i++) {
        to->codes[i] = (int8_t)nibble(from + 8 + i / 32 * 16, i % 32);
    }
}

static void pack_iq4_xs(const struct block *from, uint8_t *to) {
    int high = 0;
    memset(to, 0, 136);
    store16(to, from->d);
    for (int j = 0; j < 8; j++) {
        int scale = from->scales[j] + 32;
        to[4 + j / 2] |= (uint8_t)((scale & 15) << j % 2 * 4);
        high |= scale >> 4 << 2 * j;
    }
    store16(to + 2, (uint16_t)high);
    for (int i = 0; i < 256; i++) {
        set_nibble(to + 8 + i / 32 * 16, i % 32, from->codes[i]);
    }
}

static const int8_t iq4_levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                      1,    13,   25,  38,  53,  69,  89,  113};

static const struct layout layouts[] = {
    {2, 32, 32, 18, -8, 7, NULL, 1, 1, 0, 0, false, unpack_q4_0, pack_q4_0},
    {3, 32, 32, 20, 0, 15, NULL, 1, 1, 1, 1, true, unpack_q4_1, pack_q4_1},
    {6, 32, 32, 22, -16, 15, NULL, 1, 1, 0, 0, false, unpack_q5_0, pack_q5_0},
    {7, 32, 32, 24, 0, 31, NULL, 1, 1, 1, 1, true, unpack_q5_1, pack_q5_1},
    {8, 32, 32, 34, -127, 127, NULL, 1, 1, 0, 0, false, unpack_q8_0, pack_q8_0},
    {10, 256, 16, 84, 0, 3, NULL, 0, 15, -15, 0, true, unpack_q2_k, pack_q2_k},
    {11, 256, 16, 110, -4, 3, NULL, -32, 31, 0, 0, false, unpack_q3_k, pack_q3_k},
    {12, 256, 32, 144, 0, 15, NULL, 0, 63, -63, 0, true, unpack_q4_k, pack_q4_k},
    {13, 256, 32, 176, 0, 31, NULL, 0, 63, -63, 0, true, unpack_q5_k, pack_q5_k},
    {14, 256, 16, 210, -32, 31, NULL, -128, 127, 0, 0, false, unpack_q6_k, pack_q6_k},
    {20, 32, 32, 18, 0, 15, iq4_levels, 1, 1, 0, 0, false, unpack_iq4_nl, pack_iq4_nl},
    {23, 256, 32, 136, 0, 15, iq4_levels, -32, 31, 0, 0, false, unpack_iq4_xs, pack_iq4_xs},
};

const struct layout *layout_of(int type) {
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
        if (layouts[i].type == type) {
            return &layouts[i];
        }
    }
    return NULL;
}
