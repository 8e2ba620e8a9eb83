/* Blocks of ggml's quant types (ggml-common.h), taken apart and put together again; see blocks.c. */

#ifndef APREQEL_BLOCKS_H
#define APREQEL_BLOCKS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LARGEST_BLOCK 256
#define MOST_PARTS 16

/* Weights that are d * scale * level + m * min, with a scale and a min for each part. */
struct block {
    uint16_t d, m;               /* float16; m where the type has minima */
    int16_t scales[MOST_PARTS];  /* 1 where the type has none */
    int16_t mins[MOST_PARTS];    /* times m; 0 where the type has none */
    int8_t codes[LARGEST_BLOCK]; /* levels, or indices into the type's table of levels */
};

struct layout {
    int type;              /* ggml's id */
    int block, part;       /* weights a block, and a part with a scale of its own */
    size_t bytes;          /* a block */
    int low, high;         /* codes */
    const int8_t *levels;  /* by code; NULL where codes are the levels themselves */
    int least_scale, most_scale, least_min, most_min; /* equal where there is nothing to choose */
    bool has_m;
    void (*unpack)(const uint8_t *from, struct block *to);
    void (*pack)(const struct block *from, uint8_t *to);
};

/* NULL for types that are not of this form. */
const struct layout *layout_of(int type);

#endif
