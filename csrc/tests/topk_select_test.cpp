// The CUDA kernels of top-K selection, run on the CPU by cuda_on_cpu.h, against a stable sort and against KL in double,
// on random and adversarial rows, for as many seconds as the first argument says: `make sanitize`.
#define NOVA_THREADS 128
#include "tests/cuda_on_cpu.h"

#include "cuda/topk_kernels.cuh"

#include <algorithm>
#include <chrono>
#include <numeric>

using namespace nova::cuda;

namespace {

#define CHECK(condition)                                                              \
  do {                                                                                \
    if (!(condition)) {                                                               \
      std::fprintf(stderr, "%s:%d: %s, case %llu\n", __FILE__, __LINE__, #condition, \
                   static_cast<unsigned long long>(current_case));                    \
      std::abort();                                                                   \
    }                                                                                 \
  } while (false)

std::uint64_t current_case = 0;
std::mt19937_64 random_bits;

int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }
float normal(float spread) { return std::normal_distribution<float>(0.0f, spread)(random_bits); }

constexpr float kInfinity = INFINITY;
constexpr int kKinds = 14;

// A row of one of several kinds, each hard for some way of selecting.
std::vector<float> make_row(int kind, int vocabulary) {
  std::vector<float> row(vocabulary);
  const float spread = std::exp2(static_cast<float>(draw(-12, 6)));
  for (float& x : row) x = normal(kind == 1 ? spread : 3.0f);
  const auto some = [&](float value, int share) {
    for (float& x : row)
      if (draw(0, share) == 0) x = value;
  };
  if (kind == 2) std::fill(row.begin(), row.end(), draw(0, 1) == 0 ? 0.0f : 7.0f);
  if (kind == 3)
    for (float& x : row) x = static_cast<float>(draw(-2, 2));
  if (kind == 4) some(-kInfinity, 1);
  if (kind == 5) std::fill(row.begin(), row.end(), -kInfinity);
  if (kind == 6) some(NAN, draw(1, 1000)), some(-NAN, 1000);
  if (kind == 7) some(kInfinity, draw(1, 1000));
  if (kind == 8) std::sort(row.begin(), row.end());
  if (kind == 9) std::sort(row.rbegin(), row.rend());
  if (kind == 10)
    for (float& x : row) x = draw(0, 1) == 0 ? 0.0f : -0.0f;
  if (kind == 11) {  // few entries above -inf
    const auto kept = row[draw(0, vocabulary - 1)];
    std::fill(row.begin(), row.end(), -kInfinity);
    for (int i = draw(0, 5); i > 0; --i) row[draw(0, vocabulary - 1)] = kept;
  }
  if (kind == 12) some(NAN, 3), some(kInfinity, 3), some(-kInfinity, 3), some(-0.0f, 3), some(0.0f, 3);
  if (kind == 13)  // any bits: subnormal and huge numbers, NaN of all payloads
    for (float& x : row) x = cuda_on_cpu::bit_cast<float>(static_cast<std::uint32_t>(random_bits()));
  return row;
}

template <class F>
typename F::Bits to_bits(float x) {
  const auto bits = cuda_on_cpu::bit_cast<std::uint32_t>(x);
  if constexpr (std::is_same_v<F, Float32>) return bits;
  if constexpr (std::is_same_v<F, Float16>) return float_to_half(x);
  return static_cast<typename F::Bits>(bits >> 16);
}

// Rows in memory as a caller may have them: any stride, any alignment. Nothing before or behind them may be read.
template <class F>
struct Logits {
  int rows, vocabulary, offset;
  std::int64_t stride;
  std::vector<typename F::Bits> memory;

  Logits(int rows, int vocabulary)
      : rows(rows), vocabulary(vocabulary), offset(draw(0, 17)), stride(vocabulary + draw(0, 40)) {
    memory.resize(offset + (rows - 1) * stride + vocabulary);
    for (auto& bits : memory) bits = static_cast<typename F::Bits>(random_bits());
  }

  typename F::Bits* row(int n) { return memory.data() + offset + n * stride; }
  float at(int n, int i) { return F::to_float(row(n)[i]); }
  void fill(int n, const std::vector<float>& values) {
    for (int i = 0; i < vocabulary; ++i) row(n)[i] = to_bits<F>(values[i]);
  }
};

// Ids of the k largest by a stable sort, ascending, without -inf.
std::vector<int> sorted_ids(const std::vector<float>& row, int k) {
  std::vector<int> order(row.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return std::isnan(row[a]) ? !std::isnan(row[b]) : row[a] > row[b];
  });
  order.resize(k);
  order.erase(std::remove_if(order.begin(), order.end(), [&](int i) { return row[i] == -kInfinity; }), order.end());
  std::sort(order.begin(), order.end());
  return order;
}

bool is_close(double value, double truth, double relative, double absolute) {
  if (std::isnan(truth) || std::isinf(truth)) return std::isnan(truth) ? std::isnan(value) : value == truth;
  return std::abs(value - truth) <= relative * std::abs(truth) + absolute;
}

double log_sum(const std::vector<double>& x) {
  const double largest = *std::max_element(x.begin(), x.end());
  if (std::isinf(largest)) return largest;
  double sum = 0;
  for (const double value : x) sum += std::exp(value - largest);
  return largest + std::log(sum);
}

double true_lse(const std::vector<float>& row, float temperature) {
  std::vector<double> scaled(row.begin(), row.end());
  for (double& x : scaled) {
    if (std::isnan(x)) return NAN;
    x /= temperature;
  }
  return log_sum(scaled);
}

template <class F>
void test_select(int vocabulary, int k, int rows, bool hold_nothing = false) {
  Logits<F> logits(rows, vocabulary);
  for (int n = 0; n < rows; ++n) logits.fill(n, make_row(draw(0, kKinds - 1), vocabulary));
  std::vector<std::int32_t> ids(rows * k, -7);
  std::vector<float> values(rows * k), lse(rows);
  const float temperature = draw(0, 1) == 0 ? 1.0f : std::exp(normal(0.7f));
  Plan plan = make_plan<F>(vocabulary, k);
  CHECK(plan.possible);
  if (hold_nothing) plan.staged = false;
  const SelectArguments given{logits.row(0), logits.stride, rows,       vocabulary,    k,
                              temperature,   plan,          ids.data(), values.data(), lse.data()};
  cuda_on_cpu::launch(draw(1, rows), kThreads, plan.shared_bytes, [&] { topk_select_kernel<F>(given); });
  for (int n = 0; n < rows; ++n) {
    std::vector<float> row(vocabulary);
    for (int i = 0; i < vocabulary; ++i) row[i] = logits.at(n, i);
    std::vector<int> expected = sorted_ids(row, k);
    expected.resize(k, -1);
    for (int slot = 0; slot < k; ++slot) {
      const int id = expected[slot];
      const float value = id < 0 ? -kInfinity : row[id];
      CHECK(ids[n * k + slot] == id);
      CHECK(std::memcmp(&values[n * k + slot], &value, sizeof value) == 0);
    }
    const double truth = true_lse(row, temperature);
    if (std::isinf(truth) || !(std::abs(truth) > FLT_MAX)) CHECK(is_close(lse[n], truth, 1e-6, 2e-6));
  }
}

// KL of softmax(z) from softmax(v), or the other way round, and its derivative by z times `by`.
double true_kl(std::vector<double> z, std::vector<double> v, bool policy_ref, double by,
               std::vector<double>& gradient) {
  const double z_sum = log_sum(z), v_sum = log_sum(v);
  double kl = 0;
  gradient.assign(z.size(), 0);
  for (std::size_t i = 0; i < z.size(); ++i) {
    z[i] -= z_sum, v[i] -= v_sum;
    const double p = std::exp(z[i]), r = std::exp(v[i]);
    kl += policy_ref ? (p == 0 ? 0 : p * (z[i] - v[i])) : r * (v[i] - z[i]);
  }
  for (std::size_t i = 0; i < z.size(); ++i) {
    const double p = std::exp(z[i]), r = std::exp(v[i]);
    gradient[i] = by * (!policy_ref ? p - r : p == 0 ? 0 : p * (z[i] - v[i] - kl));
  }
  return kl;
}

template <class F, class P>
void test_kl(int format, int vocabulary, int k, int rows) {
  Logits<F> ref(rows, vocabulary);
  Logits<P> policy(rows, vocabulary);
  const float distance = std::exp2(static_cast<float>(draw(-10, 2)));
  const bool same = std::is_same_v<F, P> && draw(0, 3) == 0, mask_policy = draw(0, 3) == 0;
  for (int n = 0; n < rows; ++n) {
    std::vector<float> row = make_row(draw(0, 3) == 0 ? 11 : draw(0, 1) == 0 ? 4 : 0, vocabulary);
    ref.fill(n, row);
    for (float& x : row)
      if (!same) x = mask_policy && draw(0, 4) == 0 ? -kInfinity : x + normal(distance);
    policy.fill(n, row);
  }
  std::vector<std::int32_t> ids(rows * k, -7);
  std::vector<float> kl(rows, -7), by_kept(rows * k, -7);
  std::vector<std::uint8_t> mask(rows);
  for (auto& counts : mask) counts = draw(0, 4) != 0;
  const bool policy_ref = draw(0, 1) == 0, has_mask = draw(0, 1) == 0, gradient = draw(0, 4) != 0;
  const float temperature = draw(0, 1) == 0 ? 1.0f : 0.7f;
  const DivergenceArguments given{ref.row(0), policy.row(0), ref.stride, policy.stride, rows, format, vocabulary, k,
                                  temperature, policy_ref, make_plan<F>(vocabulary, k),
                                  has_mask ? mask.data() : nullptr, kl.data(), gradient ? by_kept.data() : nullptr,
                                  ids.data()};
  cuda_on_cpu::launch(draw(1, rows), kThreads, given.plan.shared_bytes, [&] { topk_kl_kernel<F>(given); });
  for (int n = 0; n < rows; ++n) {
    std::vector<float> row(vocabulary);
    for (int i = 0; i < vocabulary; ++i) row[i] = ref.at(n, i);
    const bool counts = !has_mask || mask[n] != 0;
    const std::vector<int> kept = counts ? sorted_ids(row, k) : std::vector<int>{};
    std::vector<double> z, v, expected;
    for (const int id : kept) z.push_back(policy.at(n, id) / temperature), v.push_back(row[id] / temperature);
    const bool no_policy = std::all_of(z.begin(), z.end(), [](double x) { return std::isinf(x); });
    double truth = counts ? NAN : 0.0;  // of nothing kept
    if (!kept.empty() && !no_policy) truth = true_kl(z, v, policy_ref, 1 / temperature, expected);
    CHECK(is_close(kl[n], truth, 1e-4, 1e-6) && !(kl[n] < 0));
    if (same && !std::isnan(truth)) CHECK(kl[n] == 0);
    for (int slot = 0; slot < k; ++slot) {
      const int used = static_cast<int>(kept.size());
      CHECK(ids[n * k + slot] == (slot < used ? kept[slot] : -1));
      if (!gradient) continue;
      if (slot >= used) CHECK(by_kept[n * k + slot] == 0);
      if (slot < used && !no_policy) CHECK(is_close(by_kept[n * k + slot], expected[slot], 1e-4, 1e-5));
    }
  }
}

template <class F>
void test_small(int format) {
  constexpr int vocabularies[] = {2, 3, 17, 33, 127, 500, 1271, 4099};
  const int vocabulary = vocabularies[draw(0, 7)];
  const int k = draw(0, 4) == 0 ? std::min(vocabulary, 4096) : draw(2, std::min(vocabulary, draw(2, 600)));
  test_select<F>(vocabulary, k, draw(1, 3), draw(0, 3) == 0);
  if (draw(0, 1) == 0) return;
  test_kl<F, F>(format, vocabulary, k, draw(1, 3));
  if (draw(0, 3) == 0) test_kl<F, Float32>(kFloat32, vocabulary, k, 1);
}

void test_half() {
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const float x = half_to_float(static_cast<std::uint16_t>(bits));
    if (std::isnan(x)) CHECK((bits & 0x7fff) > 0x7c00);
    if (!std::isnan(x)) CHECK(float_to_half(x) == bits);
  }
  CHECK(half_to_float(0x3555) == 0.333251953125f && half_to_float(0x0001) == std::ldexp(1.0f, -24));
}

void test_plans() {
  constexpr int fewer = (16 - kWarps) * 5 * 4;  // bytes than with 512 threads, which topk_select.cu speaks of
  CHECK(make_plan<BFloat16>(151'936, 500).shared_bytes == 37'728 - fewer);
  CHECK(make_plan<Float32>(151'936, 500).shared_bytes == 56'720 - fewer);
  CHECK(make_plan<BFloat16>(151'936, 500).group_bits == 4);
  CHECK(make_plan<BFloat16>(151'936, 500).staged && make_plan<Float32>(151'936, 500).staged);
  CHECK(!make_plan<Float32>(1 << 21, 4096).staged && make_plan<Float32>(1 << 21, 4096).possible);
  CHECK(!make_plan<Float32>(1 << 24, 500).possible);
  for (const int k : {2, 64, 500, 4096})  // two CTAs on an SM of 228 KB, of which 1 KB per CTA is the system's
    for (const int vocabulary : {4099, 151'936, 1 << 20, 1 << 21}) {
      CHECK(make_plan<BFloat16>(vocabulary, k).shared_bytes <= 113 * 1024);
      CHECK(make_plan<Float32>(vocabulary, k).shared_bytes <= 113 * 1024);
    }
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 2.0;
  test_half();
  test_plans();
  random_bits.seed(1);
  test_select<BFloat16>(151'936, 500, 1);
  test_select<Float32>(151'937, 4096, 1);
  const auto start = std::chrono::steady_clock::now();
  do {
    random_bits.seed(++current_case);
    cuda_on_cpu::schedule.seed(current_case);
    if (current_case % 3 == 0) test_small<Float32>(kFloat32);
    if (current_case % 3 == 1) test_small<BFloat16>(kBFloat16);
    if (current_case % 3 == 2) test_small<Float16>(kFloat16);
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds);
  std::printf("topk_select: %llu random cases in %.0f s\n", static_cast<unsigned long long>(current_case), seconds);
  return 0;
}
