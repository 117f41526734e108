/* The linear layers of a model alone, head included: the engine's own products of random weights, milliseconds by rows.
 *
 *     linear_layers HIDDEN KV_WIDTH INTERMEDIATE LAYERS VOCABULARY BITS THREADS REPEATS
 *
 * No norms, no attention, activations already in bytes; the threads meet after each product, as in a step. */
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"
#include "threads.h"

using namespace pastalm;

namespace {

constexpr int64_t MOST = 16; /* rows */

struct Work {
  const Kernels *kernels;
  std::vector<pastalm_matrix> matrices;
  std::vector<Rows> inputs; /* of each matrix */
  int64_t rows;
  std::vector<float> out; /* [rows][most outputs] */
};

/* What the engine runs on this processor. */
const Kernels *chosen() {
  const std::string name = pastalm_kernels();
#if defined(__x86_64__)
  for (const Kernels *(*kernels)() : {avx2_kernels, avx512_kernels, avx512bf16_kernels})
    if (name == kernels()->name) return kernels();
#elif defined(__aarch64__)
  if (name == "neon") return neon_kernels();
#endif
  return plain_kernels();
}

/* All products, one after the other. */
struct Pass final : Job {
  Work &work;
  const int threads;
  std::vector<Phase> phases;

  Pass(Work &work, int threads) : work(work), threads(threads), phases(work.matrices.size()) {}

  void run(int) override {
    for (size_t i = 0; i < work.matrices.size(); i++) {
      const pastalm_matrix &m = work.matrices[i];
      phases[i].each((int32_t)blocks(m), threads, [&](int64_t first, int64_t last) {
        work.kernels->product(m, work.inputs[i], 0, work.rows, first, last, work.out.data() + first * BLOCK,
                              blocks(m) * BLOCK, false, nullptr);
      });
    }
  }
};

}  // namespace

int main(int count, char **values) {
  if (count != 9) return 2;
  const auto number = [&](int i) { return int32_t(std::atol(values[i])); };
  const int32_t hidden = number(1), kv = number(2), intermediate = number(3), layers = number(4), vocabulary = number(5);
  const int32_t type = number(6) == 4 ? PASTALM_Q4 : PASTALM_Q8;
  Team team(number(7));
  Work work{nullptr, {}, {}, 0, {}};
  work.kernels = chosen();

  std::mt19937_64 random(1);
  int64_t bytes = 0;
  const auto add = [&](int32_t outputs, int32_t inputs) {
    pastalm_matrix m{nullptr, 0, type, outputs, inputs};
    m.bytes = blocks(m) * block_bytes(type, inputs);
    auto *data = static_cast<uint64_t *>(std::aligned_alloc(64, size_t(m.bytes)));
    for (int64_t i = 0; i < m.bytes / 8; i++) data[i] = random() & 0x3bff3bff3bff3bffull; /* scales are finite */
    m.data = data;
    bytes += m.bytes;
    Rows rows;
    const int64_t groups = inputs / GROUP, panels = (MOST + PANEL_ROWS - 1) / PANEL_ROWS;
    rows.width = inputs;
    rows.q = static_cast<int8_t *>(std::aligned_alloc(64, size_t(MOST * inputs)));
    rows.scale = static_cast<float *>(std::aligned_alloc(64, size_t(panels * groups * PANEL_ROWS) * 4));
    rows.offset = static_cast<int32_t *>(std::aligned_alloc(64, size_t(panels * groups * PANEL_ROWS) * 4));
    for (int64_t i = 0; i < MOST * inputs; i++) rows.q[i] = int8_t(random() % 255 - 127);
    std::fill_n(rows.scale, panels * groups * PANEL_ROWS, 1e-3f);
    std::fill_n(rows.offset, panels * groups * PANEL_ROWS, 0);
    work.matrices.push_back(m);
    work.inputs.push_back(rows);
  };
  for (int32_t layer = 0; layer < layers; layer++) {
    add(hidden + 2 * kv, hidden);
    add(hidden, hidden);
    add(2 * intermediate, hidden);
    add(hidden, intermediate);
  }
  add(vocabulary, hidden);
  work.out.resize(size_t(MOST * (std::max(2 * intermediate, vocabulary) + BLOCK)));

  for (int64_t rows : {1, 2, 3, 4, 6, 8, 9, 10, 12, 16}) {
    work.rows = rows;
    std::vector<double> times;
    for (int i = 0; i < number(8); i++) {
      const auto begin = std::chrono::steady_clock::now();
      team.run(std::make_shared<Pass>(work, team.size()));
      times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count());
    }
    std::sort(times.begin(), times.end());
    printf("k=%2d  %.2f ms  %.1f GB/s\n", int(rows), times[times.size() / 2],
           double(bytes) / times[times.size() / 2] / 1e6);
  }
}
