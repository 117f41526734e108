/* Random plans through the C interface, for builds with a sanitizer: fuzz PLANS SEED [CALLERS]
 *
 * What the header allows must succeed and give finite logits; what it forbids must be refused with an error, and the
 * same model and pool must then compute what they computed before. Each caller has models of its own and
 * makes PLANS plans; callers run at the same time. Every set of kernels that the processor has takes its turn.
 * The first surprise ends the program with 1 and one line. */
#include <climits>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <string>
#include <thread>

#include "draw.h"
#include "random_models.h"

namespace {

const std::vector<int> TYPES = {PASTALM_Q4, PASTALM_Q8, PASTALM_BF16, PASTALM_F32, PASTALM_F16};
const char *const KERNELS[] = {"plain", "avx2", "avx512", "avx512bf16", "neon"};
constexpr float NONE = -12345.f; /* what no logit is */

struct Caller {
  Random random;
  uint64_t seed;
  int plan = 0;
  long steps = 0, refused = 0;

  explicit Caller(uint64_t s) : random(s), seed(s) {}

  [[noreturn]] void surprise(const std::string &what) const {
    printf("seed %llu, plan %d, kernels %s: %s (last error: %s)\n", (unsigned long long)seed, plan, pastalm_kernels(),
           what.c_str(), pastalm_error());
    fflush(stdout);
    _Exit(1);
  }
  void must(bool holds, const std::string &what) const {
    if (!holds) surprise(what);
  }
  void must_refuse(bool refuses, const std::string &what) {
    must(refuses, "not refused: " + what);
    must(pastalm_error() && *pastalm_error(), "refused without an error: " + what);
    refused++;
  }
};

/* ------------------------------------------------------------------------------ a model and its pools */

struct Pool {
  pastalm_pool *handle;
  int slots;
};

struct Model {
  Weights weights;
  pastalm_model *handle;
  std::vector<Pool> pools;

  explicit Model(Caller &by)
      : weights(by.random, TYPES),
        handle(pastalm_model_new(&weights.config, weights.layers.data(), weights.ropes.data())) {
    by.must(handle, "a model was refused");
    grow(by);
  }
  ~Model() {
    for (Pool &pool : pools) pastalm_pool_free(pool.handle);
    pastalm_model_free(handle);
  }
  void grow(Caller &by) {
    const int slots = PASTALM_PAGE * by.random.between(1, by.random.once_in(4) ? 24 : 5);
    const int type = by.random.of({PASTALM_BF16, PASTALM_F32});
    pools.push_back({pastalm_pool_new(handle, slots, type), slots});
    by.must(pools.back().handle, "a pool was refused");
    const pastalm_config &c = weights.config;
    const int64_t least = int64_t(2) * c.layers * c.kv_heads * c.head_dim * (type == PASTALM_F32 ? 4 : 2);
    by.must(pastalm_pool_bytes(pools.back().handle) >= least, "a slot has too few bytes");
  }
  Pool &any(Caller &by) { return pools[size_t(by.random.below(int(pools.size())))]; }
};

std::vector<float> logits_of(Caller &by, const Plan &plan, Model &model, Pool &pool) {
  std::vector<float> logits(plan.keep.size() * size_t(model.weights.config.vocabulary), NONE);
  by.must(plan.run(model.handle, pool.handle, logits.data()) == 0, "a step was refused");
  for (float x : logits) by.must(std::isfinite(x) && x != NONE, "a logit is " + std::to_string(x));
  by.steps++;
  return logits;
}

void same(Caller &by, const std::vector<float> &before, const std::vector<float> &after) {
  float most = 1;
  for (float x : before) most = std::max(most, std::abs(x));
  for (size_t i = 0; i < before.size(); i++)
    by.must(std::abs(before[i] - after[i]) <= 1e-2f * most,
            "after a refusal a logit is " + std::to_string(after[i]) + ", it was " + std::to_string(before[i]));
}

/* ------------------------------------------------------------------------------ what must be refused */

struct Call { /* the arguments of pastalm_step */
  pastalm_model *model;
  pastalm_pool *pool;
  int32_t tokens, groups, kept;
  const int32_t *ids, *positions, *slots, *keep;
  const pastalm_group *group;
  float *logits;
};

/* One of the ways in which a step is wrong. `plan` and `call` are the caller's own copies. */
std::string spoil(Caller &by, Plan &plan, Call &call, const Model &model, const Pool &pool) {
  Random &random = by.random;
  const int tokens = int(plan.ids.size()), token = random.below(tokens), group = random.below(int(plan.groups.size()));
  const int low = random.of({-1, -2, INT_MIN}), huge = random.of({INT_MAX, INT_MAX - 15, 1 << 30});
  pastalm_group &g = plan.groups[size_t(group)];
  switch (random.below(28)) {
    case 0: plan.ids[size_t(token)] = random.once_in(2) ? low : model.weights.config.vocabulary; return "a token's id";
    case 1: plan.positions[size_t(token)] = low; return "a negative position";
    case 2: plan.slots[size_t(token)] = random.once_in(2) ? low : pool.slots; return "a slot outside of the pool";
    case 3:
      if (tokens == 1) return call.model = nullptr, "no model";
      return plan.slots[size_t(token)] = plan.slots[size_t((token + 1) % tokens)], "a slot twice";
    case 4: call.model = nullptr; return "no model";
    case 5: call.pool = nullptr; return "no pool";
    case 6: call.tokens = low; return "a negative number of tokens";
    case 7: call.tokens = huge; return "more tokens than groups have";
    case 8: call.ids = nullptr; return "no ids";
    case 9: call.positions = nullptr; return "no positions";
    case 10: call.slots = nullptr; return "no slots";
    case 11: call.group = nullptr; return "no groups' array";
    case 12: call.groups = random.of({low, 0}); return "no groups";
    case 13: call.groups--; return "tokens that are in no group";
    case 14: g.base += random.between(1, 15); return "a base inside a page";
    case 15: g.base = random.of({-16, -32, INT_MIN}); return "a negative base";
    case 16: g.pages = low; return "a negative number of pages";
    case 17: g.pages = random.once_in(2) ? huge : (pool.slots - g.base) / PASTALM_PAGE + 1; return "too many pages";
    case 18: g.count = random.of({low, huge, g.count + 1, g.count - 1}); return "a group's number of tokens";
    case 19: g.first = random.of({low, huge, g.first + 1, g.first - 1}); return "a group's first token";
    case 20: g.visible = nullptr; return "no visibility";
    case 21: call.kept = low; return "a negative number of kept tokens";
    case 22:
      if (plan.keep.empty()) return call.pool = nullptr, "no pool";
      return plan.keep[size_t(random.below(int(plan.keep.size())))] = random.once_in(2) ? low : tokens, "a kept token";
    case 23:
      if (plan.keep.empty()) return call.pool = nullptr, "no pool";
      return call.logits = nullptr, "nowhere to write logits";
    case 24:
      if (plan.keep.empty()) return call.pool = nullptr, "no pool";
      return call.keep = nullptr, "no kept tokens' array";
    case 25:
      plan.order[size_t(group)] = std::vector<int32_t>(size_t(g.pages), random.of({0, -1, huge}));
      plan.share[size_t(group)] = std::vector<int32_t>(size_t(g.pages), 0);
      if (g.pages == 1) plan.order[size_t(group)][0] = huge;
      g.order = plan.order[size_t(group)].data(), g.share = plan.share[size_t(group)].data();
      return "pages twice or none in the order";
    case 26:
      plan.order[size_t(group)].clear();
      for (int p = 0; p < g.pages; p++) plan.order[size_t(group)].push_back(p);
      plan.share[size_t(group)] = std::vector<int32_t>(size_t(g.pages), random.of({-1, 1, huge}));
      g.order = plan.order[size_t(group)].data();
      g.share = random.once_in(3) ? nullptr : plan.share[size_t(group)].data();
      return "shares that do not ascend from 0";
    default: g.base = pool.slots; return "a base outside of the pool";
  }
}

void wrong_step(Caller &by, Model &model, Pool &pool, const Plan &right) {
  Plan plan = right;
  std::vector<float> logits(plan.keep.size() * size_t(model.weights.config.vocabulary), NONE);
  Call call{model.handle,   pool.handle,       int32_t(plan.ids.size()), int32_t(plan.groups.size()),
            int32_t(plan.keep.size()), plan.ids.data(), plan.positions.data(), plan.slots.data(),
            plan.keep.data(), plan.groups.data(), logits.data()};
  const std::string what = spoil(by, plan, call, model, pool);
  by.must_refuse(pastalm_step(call.model, call.pool, call.tokens, call.ids, call.positions, call.slots, call.groups,
                              call.group, call.kept, call.keep, call.logits, nullptr) != 0,
                 "a step with " + what);
}

/* A model with one thing wrong. The arrays of right weights are only ever said to be shorter. */
void wrong_model(Caller &by) {
  Random &random = by.random;
  const Weights right(random, TYPES);
  pastalm_config config = right.config;
  std::vector<pastalm_layer> layers = right.layers;
  std::vector<pastalm_rope> ropes = right.ropes;
  pastalm_layer &layer = layers[size_t(random.below(int(layers.size())))];
  const int low = random.of({-1, -32, INT_MIN}), huge = random.of({INT_MAX, 1 << 30, INT_MAX / 2 + 1});
  const int wrong = random.of({low, 0, huge});
  const pastalm_config *given = &config;
  const pastalm_layer *given_layers = layers.data();
  pastalm_matrix *const matrices[] = {&layer.qkv, &layer.attention_out, &layer.gate_up,
                                      &layer.down, &config.embedding, &config.head};
  pastalm_vector *const vectors[] = {&layer.input_norm, &layer.mlp_norm, &config.norm};
  pastalm_vector *const optional[] = {&layer.qkv_bias, &layer.attention_out_bias, &layer.q_norm, &layer.k_norm,
                                      &layer.attention_post_norm, &layer.mlp_post_norm};
  pastalm_matrix &matrix = *matrices[random.below(6)];
  pastalm_vector &needed = *vectors[random.below(3)], &extra = *optional[random.below(6)];
  std::string what;
  switch (random.below(26)) {
    case 0: config.layers = wrong == huge ? 0 : wrong; what = "layers"; break; /* more than there are cannot be seen */
    case 1: config.hidden = wrong; what = "hidden"; break;
    case 2: config.intermediate = wrong; what = "intermediate"; break;
    case 3: config.heads = wrong; what = "heads"; break;
    case 4: config.kv_heads = wrong; what = "kv_heads"; break;
    case 5: config.head_dim = wrong; what = "head_dim"; break;
    case 6: config.vocabulary = wrong; what = "vocabulary"; break;
    case 7: config.ropes = low; what = "ropes"; break;
    case 8: config.activation = random.of({-1, 2, huge}); what = "activation"; break;
    case 9: config.threads = random.of({low, huge}); what = "threads"; break;
    case 10: config.hidden += 32; what = "another hidden"; break;
    case 11: config.head_dim += 2; what = "another head_dim"; break;
    case 12: config.vocabulary += 16; what = "another vocabulary"; break;
    case 13: config.intermediate += 1; what = "another intermediate"; break;
    case 14: config.kv_heads += 1; what = "another kv_heads"; break;
    case 15: given = nullptr; what = "no configuration"; break;
    case 16: given_layers = nullptr; what = "no layers"; break;
    case 17: matrix.data = nullptr; what = "a matrix without data"; break;
    case 18: matrix.data = static_cast<const char *>(matrix.data) + 4; what = "a matrix that is not aligned"; break;
    case 19: matrix.bytes -= random.of({1, 64}); what = "a matrix that is too short"; break;
    case 20: matrix.type = random.of({-1, 5, huge}); what = "a matrix's type"; break;
    case 21: matrix.outputs = random.of({low, 0, matrix.outputs + 1, huge}); what = "a matrix's outputs"; break;
    case 22: matrix.inputs = random.of({low, 0, matrix.inputs + 2, huge}); what = "a matrix's inputs"; break;
    case 23:
      if (random.once_in(2)) needed.count = random.of({low, 0, int(needed.count) - 1});
      else needed.data = nullptr;
      what = "a norm";
      break;
    case 24:
      if (!extra.count) return;
      if (random.once_in(2)) extra.count = random.of({low, int(extra.count) - 1, int(extra.count) + 1});
      else extra.data = nullptr;
      what = "a vector that may be missing";
      break;
    default:
      if (random.once_in(3)) layer.window = low, what = "a negative window";
      else if (ropes.empty() || random.once_in(2)) layer.rope = random.of({-2, config.ropes, huge}), what = "a rope's index";
      else ropes[0].inverse_frequencies.count = random.of({low, config.head_dim / 2 + 1}), what = "a rope's frequencies";
  }
  pastalm_model *made = pastalm_model_new(given, given_layers, ropes.data());
  by.must_refuse(!made, "a model with " + what);
}

void wrong_pool(Caller &by, Model &model, Pool &pool) {
  Random &random = by.random;
  const int64_t n = pool.slots, low = random.once_in(2) ? -1 : INT64_MIN, huge = random.once_in(2) ? INT64_MAX : n + 1;
  switch (random.below(8)) {
    case 0: by.must_refuse(!pastalm_pool_new(nullptr, 16, PASTALM_BF16), "a pool without a model"); break;
    case 1: by.must_refuse(!pastalm_pool_new(model.handle, low, PASTALM_F32), "a pool of negative size"); break;
    case 2: by.must_refuse(!pastalm_pool_new(model.handle, INT64_MAX - 15, PASTALM_F32), "an endless pool"); break;
    case 3: by.must_refuse(!pastalm_pool_new(model.handle, 16, random.of({-1, 0, 1, 4, 99})), "a pool's type"); break;
    case 4:
      by.must_refuse(pastalm_pool_copy(pool.handle, random.once_in(2) ? low : huge, 0, 1), "a copy from elsewhere");
      break;
    case 5:
      by.must_refuse(pastalm_pool_copy(pool.handle, 0, random.once_in(2) ? low : huge, 1), "a copy to elsewhere");
      break;
    case 6:
      by.must_refuse(pastalm_pool_copy(pool.handle, 0, 1, random.once_in(2) ? low : huge), "a copy of too many");
      break;
    default:
      by.must_refuse(random.once_in(2) ? pastalm_pool_clear(pool.handle, random.once_in(2) ? low : huge, 1)
                                       : pastalm_pool_clear(pool.handle, 0, random.once_in(2) ? low : huge),
                     "a clear outside of the pool");
  }
}

/* ------------------------------------------------------------------------------ plans */

void move_slots(Caller &by, Pool &pool) {
  const int count = by.random.between(0, pool.slots), from = by.random.between(0, pool.slots - count);
  const int to = by.random.between(0, pool.slots - count), page = from / PASTALM_PAGE * PASTALM_PAGE;
  if (by.random.once_in(2))
    by.must(pastalm_pool_clear(pool.handle, page, count / PASTALM_PAGE * PASTALM_PAGE) == 0, "a clear was refused");
  else if (std::abs(from - to) >= count)
    by.must(pastalm_pool_copy(pool.handle, from, to, count) == 0, "a copy was refused");
  else
    pastalm_pool_copy(pool.handle, from, to, count); /* onto itself: as it likes */
}

/* A pool of another model: refused, or both have the same shape. */
void strange_pool(Caller &by, Model &model, Model &other) {
  Pool &pool = other.any(by);
  const Plan plan(by.random, model.weights.config, pool.slots, 20);
  std::vector<float> logits(plan.keep.size() * size_t(model.weights.config.vocabulary));
  const int32_t failed = plan.run(model.handle, pool.handle, logits.data());
  const pastalm_config &a = model.weights.config, &b = other.weights.config;
  if (a.layers != b.layers || a.kv_heads != b.kv_heads || a.head_dim != b.head_dim)
    by.must_refuse(failed, "a pool of another shape");
}

/* Rows of logits, some of them infinite or no numbers, and what is drawn from each. */
template <class Float>
void draw(Caller &by) {
  Random &random = by.random;
  const int rows = random.between(1, 5), size = random.between(1, random.once_in(5) ? 3000 : 130);
  std::vector<std::vector<Float>> logits;
  std::vector<const void *> addresses;
  std::vector<double> temperatures;
  std::vector<uint64_t> keys;
  for (int r = 0; r < rows; r++) {
    logits.emplace_back(size_t(size));
    const float scale = random.once_in(5) ? 1e30f : 10;
    for (Float &x : logits.back()) x = Float(random.real(-scale, scale));
    for (int i = random.once_in(3) ? random.below(4) : 0; i; i--)
      logits.back()[size_t(random.below(size))] =
          std::numeric_limits<Float>::infinity() * Float(random.of({1, -1, 0})); /* 0: not a number */
    addresses.push_back(logits.back().data());
    temperatures.push_back(std::pow(10.0, double(random.real(-40, 40)) / (random.once_in(4) ? 1 : 40)));
    keys.push_back(random.bits());
  }
  std::vector<int64_t> tokens(size_t(rows), -1);
  auto call = [&](int n, int width) {
    return pastalm_draw(n, width, sizeof(Float) == 8, addresses.data(), temperatures.data(), keys.data(), tokens.data());
  };
  by.must(call(rows, size) == 0, "a draw was refused");
  for (int64_t token : tokens) by.must(token >= 0 && token < size, "drew token " + std::to_string(token));
  const std::vector<int64_t> before = tokens;
  by.must(call(rows, random.of({0, -1, INT_MIN})) != 0 && call(-1, size) != 0, "not refused: a draw from nothing");
  temperatures[size_t(random.below(rows))] = random.of({0, -1}), addresses[0] = random.once_in(2) ? nullptr : addresses[0];
  by.must(call(rows, size) != 0, "not refused: a draw at no temperature");
  by.must(tokens == before, "a draw that was refused wrote tokens");
}

void one_plan(Caller &by, std::vector<std::unique_ptr<Model>> &models) {
  Random &random = by.random;
  Model &model = *models[size_t(random.below(int(models.size())))];
  Pool &pool = model.any(by);
  const int kind = random.below(100);
  if (kind < 1) {
    models[size_t(random.below(int(models.size())))] = std::make_unique<Model>(by);
  } else if (kind < 2) {
    models.size() < 4 ? models.push_back(std::make_unique<Model>(by)) : models.pop_back();
  } else if (kind < 4) {
    if (model.pools.size() < 3) model.grow(by);
    else pastalm_pool_free(model.pools.back().handle), model.pools.pop_back();
  } else if (kind < 10) {
    wrong_model(by);
  } else if (kind < 15) {
    wrong_pool(by, model, pool);
  } else if (kind < 17) {
    strange_pool(by, model, *models[size_t(random.below(int(models.size())))]);
  } else if (kind < 25) {
    move_slots(by, pool);
  } else if (kind < 28) {
    random.once_in(2) ? draw<float>(by) : draw<double>(by);
  } else if (kind < 50) {
    const Plan plan(random, model.weights.config, pool.slots, 40);
    const std::vector<float> before = logits_of(by, plan, model, pool);
    for (int i = random.between(1, 4); i; i--) wrong_step(by, model, pool, plan);
    same(by, before, logits_of(by, plan, model, pool));
  } else {
    logits_of(by, Plan(random, model.weights.config, pool.slots, random.once_in(20) ? 150 : 40), model, pool);
  }
}

void all_plans(Caller &by, int plans) {
  std::vector<std::unique_ptr<Model>> models;
  models.push_back(std::make_unique<Model>(by));
  for (int end = by.plan + plans; by.plan < end; by.plan++) one_plan(by, models);
}

}  // namespace

int main(int count, char **arguments) {
  if (count < 3) return puts("fuzz PLANS SEED [CALLERS]"), 2;
  const int plans = atoi(arguments[1]), callers = count > 3 ? atoi(arguments[3]) : 1;
  const uint64_t seed = strtoull(arguments[2], nullptr, 10);
  std::vector<Caller> all;
  for (int i = 0; i < callers; i++) all.emplace_back(seed + uint64_t(i));
  if (pastalm_abi() != PASTALM_ABI) return puts("another version of the interface"), 1;
  if (!pastalm_use_kernels("none of these") || !pastalm_use_kernels(nullptr)) return puts("unknown kernels"), 1;
  pastalm_model_free(nullptr);
  pastalm_pool_free(nullptr);
  std::vector<const char *> found;
  for (const char *name : KERNELS)
    if (pastalm_use_kernels(name) == 0) found.push_back(name);
  for (size_t i = 0; i < found.size(); i++) {
    pastalm_use_kernels(found[i]);
    const int share = plans / int(found.size()) + (i < size_t(plans) % found.size());
    std::vector<std::thread> threads;
    for (Caller &caller : all) threads.emplace_back([&caller, share] { all_plans(caller, share); });
    for (std::thread &thread : threads) thread.join();
    printf("%s: ", found[i]);
    for (Caller &caller : all) printf("%d plans, %ld steps, %ld refused; ", caller.plan, caller.steps, caller.refused);
    puts("no surprise");
    fflush(stdout);
  }
}
