/* Sampling by Gumbel noise: which id of a row wins. Part of the C interface, beside pastalm.h. */
#ifndef PASTALM_DRAW_H
#define PASTALM_DRAW_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/* For each row the id of the largest logits[id] / temperature + noise(key, id), the first of equal ones.
 *
 * noise(key, id) = -log(-log((x + 0.5) / 2^52)) in double, with x the upper 52 bits of what splitmix64 gives for the
 * state key + (id + 1) * 0x9E3779B97F4A7C15; the quotient is rounded to the logits' type before the sum in double.
 * Where the largest quotient is not finite (a temperature near 0) the first of the largest logits wins.
 *
 * logits: [rows] addresses of [size] floats, or doubles where `doubles` is not 0. temperatures, keys, tokens: [rows].
 * 0, or 1 if an argument makes no sense; nothing is written then. */
int32_t pastalm_draw(int32_t rows, int32_t size, int32_t doubles, const void *const *logits,
                     const double *temperatures, const uint64_t *keys, int64_t *tokens);

/* For tests: with these instructions from now on, "avx512", "avx2" or "plain"; 1 where the processor lacks them. */
int32_t pastalm_draw_with(const char *name);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
