/* Logits of some small models on some plans, to compare kernels and processors with each other: logits KERNELS SEED
 *
 * The same seed gives the same models and plans everywhere. A line for each step: the weight types of the model, then
 * the logits. A line is comparable only with the same line of another run. */
#include <cstdio>

#include "random_models.h"

int main(int count, char **arguments) {
  if (count != 3) return puts("logits KERNELS SEED"), 2;
  if (pastalm_use_kernels(arguments[1])) return fprintf(stderr, "%s\n", pastalm_error()), 3;
  for (int type : {PASTALM_Q4, PASTALM_Q8, PASTALM_BF16, PASTALM_F32, PASTALM_F16})
    for (int pool_type : {PASTALM_BF16, PASTALM_F32})
      for (int m = 0; m < 6; m++) {
        Random random(strtoull(arguments[2], nullptr, 10) * 1000 + uint64_t(100 * type + 10 * pool_type + m));
        const Weights weights(random, {type});
        pastalm_model *model = pastalm_model_new(&weights.config, weights.layers.data(), weights.ropes.data());
        pastalm_pool *pool = pastalm_pool_new(model, 160, pool_type);
        for (int step = 0; step < 4; step++) {
          const Plan plan(random, weights.config, 160, 60);
          std::vector<float> logits(plan.keep.size() * size_t(weights.config.vocabulary));
          if (plan.run(model, pool, logits.data())) return fprintf(stderr, "%s\n", pastalm_error()), 1;
          printf("%d %d", type, pool_type);
          for (float x : logits) printf(" %.6g", double(x));
          puts("");
        }
        pastalm_pool_free(pool);
        pastalm_model_free(model);
      }
}
