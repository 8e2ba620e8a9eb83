/* Rounding with the output error in view; see rounding.c. */

#ifndef APREQEL_ROUNDING_H
#define APREQEL_ROUNDING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* float16 as ggml reads and writes it. */
struct half_conversions {
    float (*to_float)(uint16_t);
    uint16_t (*from_float)(float);
};

/* Whether rows of a ggml type can be rounded anew. */
bool rounding_knows(int type);

/* Bytes that `round_rows` needs as `scratch`, for rows of `length` weights. */
size_t rounding_scratch_bytes(int64_t length);

/*
 * Bring `rows` rows of `length` weights, quantised to `type` in `data` (`row_bytes` each), nearer to
 * `weights` [rows, length] in the outputs that they give: the error of a row, e, counts e' M e, with
 * M = `moments` [length, length], symmetric and with a positive diagonal. No row's error grows.
 */
void round_rows(int type, uint8_t *data, size_t row_bytes, const float *weights, int64_t rows,
                int64_t length, const float *moments, struct half_conversions half, void *scratch);

#endif
