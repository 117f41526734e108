/* The C interface of the native CPU step. Everything that Python calls stands here.
 *
 * A model is a set of packed matrices that the caller owns (NumPy arrays or a mapped file); it must outlive
 * the model. A pool holds keys and values by slot. A step takes the next tokens of any threads of any
 * requests and gives logits. Every size is checked here: a wrong one is an error, never a crash.
 * Functions that can fail return NULL or a number other than 0; pastalm_error() then has one line for people.
 * A model and its pools are used by one caller at a time.
 */
#ifndef PASTALM_H
#define PASTALM_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PASTALM_ABI 3
#define PASTALM_PAGE 16 /* slots whose visibility is one 16-bit word, and that attention reads together */

/* Weight types. Matrices are packed in blocks of 16 outputs, one block after the other, each aligned to 64 bytes.
 * Outputs are padded to a multiple of 16 with zeros. `inputs` is a multiple of 32 (Q4, Q8) or of 2.
 *   Q4    as GGML's Q4_0: w = scale * (q - 8), groups of 32 inputs. A block, for every two groups: 2 x 16 float16 scales,
 *         one an output, zeros for a group that is not there; then of each group 4 vectors of 64 bytes; byte
 *         4 * output + i of vector v has in its low half q of input 8 * v + i, in its high half of 8 * v + 4 + i
 *         (i < 4).
 *   Q8    as GGML's Q8_0: w = scale * (q - 128), q stored as a byte without sign. As Q4, but of each group 8 vectors; byte
 *         4 * output + i of vector v is q of input 4 * v + i.
 * So a product reads a matrix from its first byte to its last without a jump, as processors foresee it.
 *   BF16  [inputs / 2][16 outputs][2 inputs]
 *   F32   [inputs][16 outputs]
 *   F16   [inputs][16 outputs] */
enum { PASTALM_Q4 = 0, PASTALM_Q8 = 1, PASTALM_BF16 = 2, PASTALM_F32 = 3, PASTALM_F16 = 4 };
enum { PASTALM_SILU = 0, PASTALM_GELU_TANH = 1 };

typedef struct {
  const void *data; /* packed, aligned to 64 bytes */
  int64_t bytes;
  int32_t type, outputs, inputs; /* outputs without padding */
} pastalm_matrix;

typedef struct {
  const float *data;
  int64_t count; /* 0: there is none */
} pastalm_vector;

typedef struct {
  pastalm_matrix qkv;           /* [(heads + 2 * kv_heads) * head_dim, hidden]: queries, keys, values */
  pastalm_matrix attention_out; /* [hidden, heads * head_dim] */
  pastalm_matrix gate_up;       /* [2 * intermediate, hidden]: 32 outputs of the gate, the 32 of `up` that belong to
                                   them, the next 32 of the gate ... */
  pastalm_matrix down;          /* [hidden, intermediate] */
  pastalm_vector input_norm, qkv_bias, attention_out_bias, q_norm, k_norm; /* q_norm, k_norm: [head_dim] or none */
  pastalm_vector attention_post_norm;     /* of what attention adds (Gemma) */
  pastalm_vector mlp_norm, mlp_post_norm; /* before the MLP; of what it adds (Gemma) */
  int32_t rope;                           /* which of the model's, -1: no rotation */
  int32_t window;                         /* sliding window by position, 0: none */
} pastalm_layer;

typedef struct {
  pastalm_vector inverse_frequencies; /* half of the dimensions that rotate */
  float factor;                       /* multiplies cosine and sine (YaRN) */
} pastalm_rope;

typedef struct {
  /* intermediate: a multiple of 32; head_dim: of 16, 1024 at most; threads: 1 to 256 */
  int32_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, ropes, activation, threads;
  float epsilon;           /* of the norms */
  float embedding_scale;   /* 1: none */
  float attention_scale;   /* of queries times keys */
  float attention_softcap; /* 0: none */
  float logit_softcap;     /* 0: none */
  pastalm_matrix embedding; /* [vocabulary, hidden]; may be the same data as head */
  pastalm_matrix head;      /* [vocabulary, hidden] */
  pastalm_vector norm;      /* before the head. Norm weights are what is multiplied with (Gemma's 1 + w is added up) */
} pastalm_config;

typedef struct pastalm_model pastalm_model;
typedef struct pastalm_pool pastalm_pool;

/* Tokens first .. first + count - 1 of a step: of one request. They may see the slots base .. base + 16 * pages - 1. */
typedef struct {
  int32_t first, count, base, pages; /* base: a multiple of 16 */
  const uint16_t *visible;           /* [count][pages]; bit s of word p: slot base + 16 * p + s */
  const int32_t *order;              /* [pages] each page once; NULL: as they lie, in shares of 16 */
  const int32_t *share;              /* [pages] of each in that order, ascending from 0: pages of a share are summed first */
} pastalm_group;

int32_t pastalm_abi(void);
const char *pastalm_error(void);   /* of the calling thread's last failure */
const char *pastalm_kernels(void); /* "avx512bf16", "avx512", "avx2", "neon", "plain": what this processor runs */
int32_t pastalm_use_kernels(const char *name); /* for tests: these from now on, where the processor has them */

pastalm_model *pastalm_model_new(const pastalm_config *config, const pastalm_layer *layers, const pastalm_rope *ropes);
void pastalm_model_free(pastalm_model *model);

/* Keys and values for `slots` tokens (a multiple of 16), in bfloat16 or float32; memory is taken when it is first written.
 * pastalm_pool_bytes: of one slot. */
pastalm_pool *pastalm_pool_new(const pastalm_model *model, int64_t slots, int32_t type);
void pastalm_pool_free(pastalm_pool *pool);
int64_t pastalm_pool_bytes(const pastalm_pool *pool);
/* What slots from .. from + count - 1 hold, also in to .. to + count - 1, which are others. */
int32_t pastalm_pool_copy(pastalm_pool *pool, int64_t from, int64_t to, int64_t count);
/* Gives the memory of some slots back, by pages of 16; they read as zeros. */
int32_t pastalm_pool_clear(pastalm_pool *pool, int64_t first, int64_t count);

/* One forward pass. ids, positions, slots: [tokens], no slot twice; what a token sees is written before it is read, so
 * tokens of one step may see each other. keep: [kept] tokens whose logits are wanted, ascending; logits: [kept][vocabulary].
 * likeliest: [kept] the id of the largest logit, the first of equal ones; -1 where one is not finite. NULL: not wanted. */
int32_t pastalm_step(pastalm_model *model, pastalm_pool *pool, int32_t tokens, const int32_t *ids,
                     const int32_t *positions, const int32_t *slots, int32_t groups, const pastalm_group *group,
                     int32_t kept, const int32_t *keep, float *logits, int32_t *likeliest);

#ifdef __cplusplus
}
#endif
#endif
