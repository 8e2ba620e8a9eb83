/*
 * Rounding with the output error in view.
 *
 * A row w of a weight matrix that reads activations x is written as q: its output is off by
 * (q - w)'x, on the whole by e'Me, with e = q - w and M the second moments of x. ggml rounds each
 * block of a row by itself, weighing its columns by the diagonal of M; here its result is the start
 * of a coordinate descent on the whole of e'Me (QuantEase, Behdin et al. 2023, arXiv 2309.01885),
 * not only over the codes but also over the scales and minima of blocks and sub-blocks, each set to
 * the best value that its bits can hold while the rest stands. The result is an ordinary row of the
 * type.
 *
 * The gradient M e of a row is kept up to date. A block is worked on with the part of it that is its
 * own; only when it is done the rest of the row hears of it. Several rows go through the moments
 * together, so that these are read from memory once for all of them.
 */

#include "rounding.h"

#include "blocks.h"

#include <string.h>

/* Rows that go through the moments together. */
#define ROWS_AT_ONCE 16
/* Over all blocks of a row, and of codes and scales within a block. */
#define PASSES 4
#define ROUNDS 3

/* Vectorised for what the processor has; the same operations in the same order everywhere. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) &&        \
    !defined(__clang__)
#define VECTORISED __attribute__((target_clones("default", "avx2")))
#else
#define VECTORISED
#endif
/* Into what is vectorised. */
#define INLINE static inline __attribute__((always_inline))

bool rounding_knows(int type) { return layout_of(type) != NULL; }

/* A row being rounded: its weights as they now read, the gradient, and its blocks. */
struct row {
    float *values, *gradient; /* [length] */
    struct block *blocks;
};

/* A block of columns, in one row. */
struct place {
    const struct layout *layout;
    struct block *block;
    float *values, *gradient; /* of its columns alone */
    const float *moments;     /* of its columns; a row further is `stride` on */
    int64_t stride;
    const float *inverse; /* of the diagonal of the moments */
    struct half_conversions half;
};

INLINE void add_scaled(float *restrict to, const float *restrict from, float factor, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        to[i] += factor * from[i];
    }
}

INLINE float dot(const float *a, const float *b, int n) {
    float sums[4] = {0};
    for (int i = 0; i < n; i += 4) {
        for (int j = 0; j < 4; j++) {
            sums[j] += a[i + j] * b[i + j];
        }
    }
    return sums[0] + sums[1] + (sums[2] + sums[3]);
}

INLINE float level(const struct layout *layout, int code) {
    return layout->levels ? layout->levels[code] : (float)code;
}

/* The whole number in [least, most] nearest to `value`. */
INLINE int nearest_whole(float value, int least, int most) {
    value = value < most ? value : (float)most;
    return value > least ? (int)(value - least + 0.5f) + least : least;
}

/* The code whose level is nearest. */
INLINE int nearest_code(const struct layout *layout, float wanted) {
    if (!layout->levels) {
        return nearest_whole(wanted, layout->low, layout->high);
    }
    int code = layout->low;
    while (code < layout->high && 2 * wanted > layout->levels[code] + layout->levels[code + 1]) {
        code++;
    }
    return code;
}

INLINE void move(struct place *p, int column, float to) {
    float change = to - p->values[column];
    add_scaled(p->gradient, p->moments + column * p->stride, change, p->layout->block);
    p->values[column] = to;
}

INLINE bool choose_codes(struct place *p, float d, float m) {
    const struct layout *layout = p->layout;
    bool changed = false;
    for (int part = 0; part < layout->block / layout->part; part++) {
        float step = d * p->block->scales[part], base = m * p->block->mins[part];
        float steps = 1 / step; /* a weight */
        for (int i = part * layout->part; i < (part + 1) * layout->part && step != 0; i++) {
            float best = p->values[i] - p->gradient[i] * p->inverse[i];
            int code = nearest_code(layout, (best - base) * steps);
            if (code != p->block->codes[i]) {
                p->block->codes[i] = (int8_t)code;
                move(p, i, step * level(layout, code) + base);
                changed = true;
            }
        }
    }
    return changed;
}

/* How far to go along `direction` of the `n` columns from `first` for the least error. */
INLINE float best_step(const struct place *p, const float *direction, int first, int n) {
    float slope = dot(direction, p->gradient + first, n), curvature = 0;
    for (int i = 0; i < n; i++) {
        const float *moments = p->moments + (first + i) * p->stride + first;
        curvature += direction[i] * dot(moments, direction, n);
    }
    return curvature > 0 ? -slope / curvature : 0;
}

/* Of the part: its scale, and its min. */
INLINE bool choose_part(struct place *p, int part, float d, float m) {
    const struct layout *layout = p->layout;
    int n = layout->part, first = part * n;
    int16_t *scale = &p->block->scales[part], *min = &p->block->mins[part];
    int old_scale = *scale, old_min = *min;
    float direction[LARGEST_BLOCK];
    if (layout->least_scale < layout->most_scale) {
        for (int i = 0; i < n; i++) {
            direction[i] = d * level(layout, p->block->codes[first + i]);
        }
        float best = (float)*scale + best_step(p, direction, first, n);
        *scale = (int16_t)nearest_whole(best, layout->least_scale, layout->most_scale);
        for (int i = 0; i < n && *scale != old_scale; i++) {
            move(p, first + i, p->values[first + i] + (float)(*scale - old_scale) * direction[i]);
        }
    }
    if (layout->least_min < layout->most_min) {
        for (int i = 0; i < n; i++) {
            direction[i] = m;
        }
        float best = (float)*min + best_step(p, direction, first, n);
        *min = (int16_t)nearest_whole(best, layout->least_min, layout->most_min);
        for (int i = 0; i < n && *min != old_min; i++) {
            move(p, first + i, p->values[first + i] + (float)(*min - old_min) * m);
        }
    }
    return *scale != old_scale || *min != old_min;
}

/* `value` [float16], which all columns of the block follow as `direction` says. */
INLINE bool choose_factor(struct place *p, uint16_t *value, const float *direction) {
    int n = p->layout->block;
    float pull[LARGEST_BLOCK] = {0}, old = p->half.to_float(*value);
    for (int i = 0; i < n; i++) {
        add_scaled(pull, p->moments + i * p->stride, direction[i], n);
    }
    float slope = dot(direction, p->gradient, n), curvature = dot(direction, pull, n);
    if (!(curvature > 0)) {
        return false;
    }
    uint16_t chosen = p->half.from_float(old - slope / curvature);
    float change = p->half.to_float(chosen) - old;
    if (!(change * slope + 0.5f * change * change * curvature < 0)) {
        return false;
    }
    *value = chosen;
    add_scaled(p->gradient, pull, change, n);
    add_scaled(p->values, direction, change, n);
    return true;
}

INLINE bool choose_factors(struct place *p) {
    const struct layout *layout = p->layout;
    struct block *block = p->block;
    float direction[LARGEST_BLOCK];
    for (int i = 0; i < layout->block; i++) {
        direction[i] = block->scales[i / layout->part] * level(layout, block->codes[i]);
    }
    bool changed = choose_factor(p, &block->d, direction);
    if (layout->has_m) {
        for (int i = 0; i < layout->block; i++) {
            direction[i] = block->mins[i / layout->part];
        }
        changed |= choose_factor(p, &block->m, direction);
    }
    return changed;
}

/* Everything that the block holds, while the rest of the row stands. */
VECTORISED
static void choose_block(struct place *p, bool with_factors) {
    const struct layout *layout = p->layout;
    for (int round = 0; round < ROUNDS; round++) {
        float d = p->half.to_float(p->block->d), m = p->half.to_float(p->block->m);
        bool changed = choose_codes(p, d, m);
        for (int part = 0; part < layout->block / layout->part; part++) {
            changed |= choose_part(p, part, d, m);
        }
        if (with_factors && (round == 0 || layout->block < LARGEST_BLOCK)) {
            changed |= choose_factors(p);
        }
        if (!changed) {
            break;
        }
    }
    choose_codes(p, p->half.to_float(p->block->d), p->half.to_float(p->block->m));
}

/* The gradients of a few rows after `changes` [rows][columns] of the `n` columns from `start`. */
VECTORISED
static void follow(struct row *rows, int n_rows, int64_t start, int64_t n, int64_t length,
                   const float *moments, float changes[][LARGEST_BLOCK], bool within) {
    for (int64_t i = 0; i < n; i++) {
        const float *m = moments + (start + i) * length;
        for (int r = 0; r < n_rows; r++) {
            float change = changes[r][i], *g = rows[r].gradient;
            if (change == 0) {
                continue;
            }
            if (within) {
                add_scaled(g, m, change, length);
            } else {
                add_scaled(g, m, change, start);
                add_scaled(g + start + n, m + start + n, change, length - start - n);
            }
        }
    }
}

/* Over all blocks of a few rows, once. */
static void pass(const struct layout *layout, struct row *rows, int n_rows, int64_t length,
                 const float *moments, const float *inverse, struct half_conversions half,
                 bool with_factors) {
    float changes[ROWS_AT_ONCE][LARGEST_BLOCK];
    int n = layout->block;
    for (int64_t start = 0; start < length; start += n) {
        for (int r = 0; r < n_rows; r++) {
            struct row *row = &rows[r];
            float before[LARGEST_BLOCK];
            memcpy(before, row->values + start, (size_t)n * sizeof(float));
            struct place p = {layout,
                              row->blocks + start / n,
                              row->values + start,
                              row->gradient + start,
                              moments + start * length + start,
                              length,
                              inverse + start,
                              half};
            choose_block(&p, with_factors);
            for (int i = 0; i < n; i++) {
                changes[r][i] = row->values[start + i] - before[i];
            }
        }
        follow(rows, n_rows, start, n, length, moments, changes, false);
    }
}

static void read_row(const struct layout *layout, const uint8_t *data, int64_t length,
                     struct half_conversions half, struct row *to) {
    for (int64_t start = 0; start < length; start += layout->block) {
        struct block *block = to->blocks + start / layout->block;
        memset(block, 0, sizeof *block);
        layout->unpack(data + start / layout->block * (int64_t)layout->bytes, block);
        float d = half.to_float(block->d), m = half.to_float(block->m);
        for (int i = 0; i < layout->block; i++) {
            int part = i / layout->part;
            to->values[start + i] = d * block->scales[part] * level(layout, block->codes[i]) +
                                    m * block->mins[part];
        }
    }
}

size_t rounding_scratch_bytes(int64_t length) {
    size_t n = (size_t)length;
    return n * sizeof(float) +
           ROWS_AT_ONCE * (2 * n * sizeof(float) + (n / 32 + 1) * sizeof(struct block));
}

void round_rows(int type, uint8_t *data, size_t row_bytes, const float *weights, int64_t rows,
                int64_t length, const float *moments, struct half_conversions half, void *scratch) {
    const struct layout *layout = layout_of(type);
    struct row tile[ROWS_AT_ONCE];
    float *inverse = scratch, *floats = inverse + length;
    struct block *blocks = (void *)(floats + 2 * ROWS_AT_ONCE * length);
    for (int64_t i = 0; i < length; i++) {
        inverse[i] = 1 / moments[i * length + i];
    }
    for (int r = 0; r < ROWS_AT_ONCE; r++) {
        tile[r] = (struct row){floats + 2 * r * length, floats + (2 * r + 1) * length,
                               blocks + r * (length / layout->block)};
    }
    for (int64_t first = 0; first < rows; first += ROWS_AT_ONCE) {
        int n = rows - first < ROWS_AT_ONCE ? (int)(rows - first) : ROWS_AT_ONCE;
        for (int r = 0; r < n; r++) {
            read_row(layout, data + (size_t)(first + r) * row_bytes, length, half, &tile[r]);
            memset(tile[r].gradient, 0, (size_t)length * sizeof(float));
        }
        for (int64_t start = 0; start < length; start += layout->block) {
            float errors[ROWS_AT_ONCE][LARGEST_BLOCK];
            for (int r = 0; r < n; r++) {
                for (int i = 0; i < layout->block; i++) {
                    int64_t at = start + i;
                    errors[r][i] = tile[r].values[at] - weights[(first + r) * length + at];
                }
            }
            follow(tile, n, start, layout->block, length, moments, errors, true);
        }
        for (int i = 0; i < PASSES; i++) {
            pass(layout, tile, n, length, moments, inverse, half, i < 2);
        }
        for (int r = 0; r < n; r++) {
            for (int64_t i = 0; i < length / layout->block; i++) {
                layout->pack(&tile[r].blocks[i], data + (size_t)(first + r) * row_bytes +
                                                     (size_t)i * layout->bytes);
            }
        }
    }
}
