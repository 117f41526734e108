/* What happens where memory ends: each call that gets none must fail with an error, and succeed once there is some.
 * Linux only; not for builds with a sanitizer, which need more address space than this leaves. */
#include <sys/resource.h>

#include <cstdio>
#include <fstream>
#include <string>

#include "random_models.h"

namespace {

int64_t used() { /* bytes of address space */
  int64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  return pages * 4096;
}

void leave(int64_t bytes) {
  rlimit limit;
  getrlimit(RLIMIT_AS, &limit);
  limit.rlim_cur = bytes < 0 ? limit.rlim_max : rlim_t(used() + bytes);
  setrlimit(RLIMIT_AS, &limit);
}

int wrong(const char *what) {
  printf("%s (last error: %s)\n", what, pastalm_error());
  return 1;
}

}  // namespace

int main() {
  Random random(5);
  Weights weights(random, {PASTALM_F32});
  auto model_of = [&](int threads) {
    weights.config.threads = threads;
    return pastalm_model_new(&weights.config, weights.layers.data(), weights.ropes.data());
  };
  leave(100 << 20);
  if (model_of(200)) return wrong("200 threads in 100 MB");
  leave(-1);
  pastalm_model *model = model_of(3);
  if (!model) return wrong("no model where there is memory");
  leave(1 << 20);
  if (pastalm_pool_new(model, 1 << 24, PASTALM_F32)) return wrong("a pool of gigabytes in 1 MB");
  leave(-1);
  const int slots = 1 << 14, tokens = 1 << 13;
  pastalm_pool *pool = pastalm_pool_new(model, slots, PASTALM_BF16);
  if (!pool) return wrong("no pool where there is memory");
  std::vector<int32_t> zeros(tokens, 0), numbers(tokens);
  for (int i = 0; i < tokens; i++) numbers[size_t(i)] = i;
  const int pages = 1;
  std::vector<uint16_t> visible(size_t(tokens * pages), 1);
  const pastalm_group group{0, tokens, 0, pages, visible.data(), nullptr, nullptr};
  std::vector<float> logits(size_t(weights.config.vocabulary));
  auto step = [&] {
    return pastalm_step(model, pool, tokens, zeros.data(), numbers.data(), numbers.data(), 1, &group, 1, zeros.data(),
                        logits.data(), nullptr);
  };
  leave(1 << 20);
  if (!step()) return wrong("a large step in 1 MB");
  leave(-1);
  if (step()) return wrong("no step where there is memory");
  pastalm_pool_free(pool);
  pastalm_model_free(model);
  puts("no surprise");
}
