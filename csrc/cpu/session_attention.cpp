// session_attention: a task is some sessions of one head; it reads their items where they lie and
// writes each output once. What sessions share, the gradients of positions and biases, is summed
// over a fixed part of the sessions and then over the parts, whatever the number of threads.
#include "session_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include "dropout_key.h"
#include "item_rows.h"

// The vector unit comes first.
#include "simd_portable.h"

// and its kernels
#include "session_attention_kernel.h"

namespace t4r_fast {

extern const AttentionKernels<float> session_attention_f32_avx2, session_attention_f32_avx512;
extern const AttentionKernels<double> session_attention_f64_avx2, session_attention_f64_avx512;

namespace {

constexpr const char* kOp = "session_attention";

const AttentionKernels<float> session_attention_f32_portable = attention_kernels<F32>();
const AttentionKernels<double> session_attention_f64_portable = attention_kernels<F64>();

template <typename T>
const AttentionKernels<T>& kernels();

template <>
const AttentionKernels<float>& kernels<float>() {
  return CHOOSE_BY_ISA(session_attention_f32);
}
template <>
const AttentionKernels<double>& kernels<double>() {
  return CHOOSE_BY_ISA(session_attention_f64);
}

// Sessions that are summed on their own: with 16, eight threads have eight tasks each at four
// heads, and adding them up (16 x 30 kB at 20 items and width 192) takes a thirtieth of backward.
constexpr int64_t kParts = 16;

Tensor with_unit_elements(const Tensor& tensor) {
  return tensor.size(2) <= 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// The arguments of both functions, checked; tensors are kept alive here.
struct Problem {
  Problem(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& offsets_in,
          const std::optional<Tensor>& rows, const std::optional<Tensor>& keys,
          const std::optional<Tensor>& key_bias, const std::optional<Tensor>& position_bias,
          bool causal, double scale, double dropout, const std::optional<Tensor>& seed,
          int64_t site)
      : items(k_in.dim() == 3 ? k_in.size(0) : 0) {
    a.heads = q_in.dim() == 3 ? q_in.size(1) : 0;
    a.width = q_in.dim() == 3 ? q_in.size(2) : 0;
    CHECK(a.heads > 0 && a.width > 0, kOp, ": q must have shape (R, H, Dh), H and Dh >= 1");
    type = q_in.scalar_type();
    a.q = heads("q", "(R, H, Dh)", q_in, 0);
    a.k = heads("k", "(U, H, Dh)", k_in, 1);
    a.v = heads("v", "(U, H, Dh)", v_in, 2);
    CHECK(v_in.size(0) == items, kOp, ": v must have the shape of k");
    a.keys = {{nullptr, 0, a.q.rows.dtype}, 0};
    a.reach = 0;
    if (keys.has_value()) {
      CHECK(key_bias.has_value() && position_bias.has_value(), kOp,
            ": keys, key_bias and position_bias must be given together");
      a.keys = heads("relative.keys", "(2 * M, H, Dh)", *keys, 3);
      CHECK(keys->size(0) % 2 == 0, kOp, ": relative.keys must have shape (2 * M, H, Dh); got ",
            keys->size(0), " rows");
      a.reach = keys->size(0) / 2;
      a.key_bias = bias("relative.key_bias", *key_bias, 4);
      a.position_bias = bias("relative.position_bias", *position_bias, 5);
    }
    a.causal = causal;
    a.scale = scale;
    a.dropout = dropout_of(kOp, seed, site, dropout);
    read_offsets(Integers(kOp, "offsets", offsets_in));
    queries = q_in.size(0);
    if (rows.has_value()) {
      const Integers list(kOp, "rows", *rows);
      CHECK(list.count == queries, kOp, ": q must have one row per entry of rows, ", list.count,
            "; got ", queries);
      read_rows(list);
    } else {
      CHECK(queries == items, kOp, ": q must have one row per item of k, ", items, "; got ",
            queries);
      every_item();
    }
    a.offsets = offsets.data();
    a.first = first.data();
    a.query = query.data();
    a.place = place.data();
  }

  bool is_double() const { return type == ScalarType::Double; }
  bool relative() const { return a.keys.rows.data != nullptr; }
  int64_t sessions() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t parts() const { return std::min(sessions(), kParts); }

  // task(first session, session after the last, head, part), one call for each part and head.
  template <typename Task>
  void for_tasks(double products_per_pair, const Task& task) const {
    // some 30 us; waking a thread takes 5 us
    constexpr double kProducts = 5e5;
    double pairs = 0;
    for (int64_t b = 0; b < sessions(); ++b) {
      pairs += static_cast<double>(first[b + 1] - first[b]) *
               static_cast<double>(offsets[b + 1] - offsets[b]);
    }
    const int64_t tasks = parts() * a.heads;
    const double products = products_per_pair * pairs * static_cast<double>(a.heads) *
                            static_cast<double>(a.width + 16);
    const double useful = std::min(products / kProducts, 1e6) + 1;
    const int64_t grain =
        std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(tasks) / useful));
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t t, int64_t stop) {
      const Buffer<char> scratch(scratch_bytes);
      for (; t < stop; ++t) {
        const int64_t part = t / a.heads;
        task(sessions() * part / parts(), sessions() * (part + 1) / parts(), t % a.heads, part,
             scratch.data());
      }
    });
  }

  template <typename T>
  void prepare() {
    a.padded = round_up(a.width, kernels<T>().lanes);
    scratch_bytes = attention_scratch<T>(a.longest, a.padded);
  }

  Heads heads(const char* name, const char* shape, const Tensor& tensor, int place) {
    CHECK(tensor.dim() == 3 && tensor.size(1) == a.heads && tensor.size(2) == a.width, kOp, ": ",
          name, " must have shape ", shape, " with the H and Dh of q");
    CHECK(tensor.scalar_type() == type, kOp, ": ", name, " must have the dtype of q");
    kept[place] = with_unit_elements(tensor);
    const Tensor& t = *kept[place];
    return {{t.const_data_ptr(), t.stride(0), dtype_of(kOp, name, t)}, t.stride(1)};
  }

  Matrix bias(const char* name, const Tensor& tensor, int place) {
    CHECK(tensor.dim() == 2 && tensor.size(0) == a.heads && tensor.size(1) == a.width, kOp, ": ",
          name, " must have shape (H, Dh) with the H and Dh of q");
    CHECK(tensor.scalar_type() == type, kOp, ": ", name, " must have the dtype of q");
    kept[place] = with_unit_rows(tensor);
    return matrix(kOp, name, *kept[place]);
  }

  Attention a{};
  ScalarType type;
  int64_t items, queries = 0;
  int64_t scratch_bytes = 0;
  std::vector<int64_t> skipped;  // entries of q without an item in a session
  std::vector<int64_t> offsets, first, query, place;

 private:
  void read_offsets(const Integers& given) {
    CHECK(given.count > 0, kOp, ": offsets must have shape (B + 1,), at least one entry");
    offsets.resize(static_cast<size_t>(given.count));
    a.longest = 0;
    for (int64_t b = 0; b < given.count; ++b) {
      offsets[b] = given[b];
      if (b == 0) continue;
      const int64_t length = offsets[b] - offsets[b - 1];
      CHECK(length >= 0, kOp, ": offsets must ascend from 0 to at most ", items,
            " (the items of k); got ", offsets[b - 1], " and then ", offsets[b], " at entry ", b);
      CHECK(!relative() || length <= a.reach, kOp,
            ": relative.keys must have 2 * M rows, M >= the longest session; got M = ", a.reach,
            " and session ", b - 1, " of ", length, " items");
      a.longest = std::max(a.longest, length);
    }
    CHECK(offsets.front() == 0 && offsets.back() <= items, kOp,
          ": offsets must ascend from 0 to at most ", items, " (the items of k); got ",
          offsets.front(), " to ", offsets.back());
  }

  void every_item() {
    const int64_t used = offsets.back();
    first = offsets;
    query.resize(static_cast<size_t>(used));
    place.resize(static_cast<size_t>(used));
    for (int64_t b = 0; b < sessions(); ++b) {
      for (int64_t i = offsets[b]; i < offsets[b + 1]; ++i) {
        query[i] = i;
        place[i] = i - offsets[b];
      }
    }
    for (int64_t i = used; i < items; ++i) skipped.push_back(i);
  }

  // Entries by session, in their order: those of a session need not stand together.
  void read_rows(const Integers& rows) {
    const int64_t used = offsets.back();
    std::vector<int64_t> session(static_cast<size_t>(rows.count));
    first.assign(offsets.size(), 0);
    int64_t last = 0;  // rows mostly ascend: most stand in the session of the one before
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t item = rows[r];
      CHECK(item < items, kOp, ": rows must be < ", items,
            " (the items of k), or negative to skip; got ", item, " at entry ", r);
      session[r] = -1;
      if (item < 0 || item >= used) {
        skipped.push_back(r);
        continue;
      }
      if (item < offsets[last] || item >= offsets[last + 1]) {
        last = std::upper_bound(offsets.begin(), offsets.end(), item) - offsets.begin() - 1;
      }
      session[r] = last;
      ++first[last + 1];
    }
    for (size_t b = 1; b < first.size(); ++b) first[b] += first[b - 1];
    query.resize(static_cast<size_t>(first.back()));
    place.resize(query.size());
    std::vector<int64_t> next = first;
    for (int64_t r = 0; r < rows.count; ++r) {
      if (session[r] < 0) continue;
      const int64_t at = next[session[r]]++;
      query[at] = r;
      place[at] = rows[r] - offsets[session[r]];
    }
  }

  std::optional<Tensor> kept[6];
};

void zero_rows(const std::vector<int64_t>& rows, const Tensor& tensor, int64_t width) {
  const size_t bytes = static_cast<size_t>(width * tensor.element_size());
  char* const data = static_cast<char*>(tensor.mutable_data_ptr());
  for (const int64_t row : rows) std::memset(data + row * static_cast<int64_t>(bytes), 0, bytes);
}

template <typename T>
void forward(Problem& problem, const Tensor& out, const Tensor& lse) {
  problem.prepare<T>();
  const AttentionOutputs<T> to{out.mutable_data_ptr(), static_cast<T*>(lse.mutable_data_ptr())};
  problem.for_tasks(problem.relative() ? 3 : 2,
                    [&](int64_t b, int64_t stop, int64_t head, int64_t, char* scratch) {
                      kernels<T>().forward(problem.a, b, stop, head, to, scratch);
                    });
}

std::tuple<Tensor, Tensor> session_attention_fwd_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& offsets,
    const std::optional<Tensor>& rows, const std::optional<Tensor>& keys,
    const std::optional<Tensor>& key_bias, const std::optional<Tensor>& position_bias, bool causal,
    double scale, double dropout, const std::optional<Tensor>& seed, int64_t site) {
  Problem problem(q, k, v, offsets, rows, keys, key_bias, position_bias, causal, scale, dropout,
                  seed, site);
  const Attention& a = problem.a;
  const ScalarType sums = problem.is_double() ? ScalarType::Double : ScalarType::Float;
  Tensor out = torch::stable::new_empty(q, {problem.queries, a.heads, a.width});
  Tensor lse = torch::stable::new_empty(q, {problem.queries, a.heads}, sums);
  zero_rows(problem.skipped, out, a.heads * a.width);
  zero_rows(problem.skipped, lse, a.heads);
  if (problem.is_double()) {
    forward<double>(problem, out, lse);
  } else {
    forward<float>(problem, out, lse);
  }
  return {out, lse};
}

// Row `row` of the parts of a head, added up in their order.
template <typename T>
void sum_parts(const T* sums, int64_t parts, int64_t stride, int64_t width, T* out) {
  std::copy_n(sums, width, out);
  for (int64_t p = 1; p < parts; ++p) {
    for (int64_t d = 0; d < width; ++d) out[d] += sums[p * stride + d];
  }
}

template <typename T>
void backward(Problem& problem, const Heads& dout, const Tensor& lse, const Tensor& dq,
              const Tensor& dk, const Tensor& dv, const Tensor& dkeys, const Tensor& dkey_bias,
              const Tensor& dposition_bias) {
  problem.prepare<T>();
  const Attention& a = problem.a;
  const int64_t parts = problem.parts(), places = std::max<int64_t>(2 * a.longest - 1, 0);
  const int64_t each = problem.relative() ? (places + 2) * a.padded : 0;
  const Buffer<T> sums(parts * a.heads * each);
  const int64_t forward_products = problem.relative() ? 3 : 2;
  problem.for_tasks(static_cast<double>(2 * forward_products + 2),
                    [&](int64_t b, int64_t stop, int64_t head, int64_t part, char* scratch) {
                      T* const own = sums.data() + (part * a.heads + head) * each;
                      std::fill_n(own, each, T(0));
                      kernels<T>().backward(
                          a, b, stop, head,
                          {dout, static_cast<const T*>(lse.const_data_ptr()), dq.mutable_data_ptr(),
                           dk.mutable_data_ptr(), dv.mutable_data_ptr(), own},
                          scratch);
                    });
  if (!problem.relative() || parts == 0) return;
  const Dtype dtype = a.q.rows.dtype;
  const Buffer<T> row(a.width);
  for (int64_t r = 0; r < places + 2; ++r) {
    for (int64_t head = 0; head < a.heads; ++head) {
      sum_parts(sums.data() + head * each + r * a.padded, parts, a.heads * each, a.width,
                row.data());
      const bool is_place = r < places;
      const Tensor& to = is_place ? dkeys : r == places ? dkey_bias : dposition_bias;
      const int64_t line = is_place ? a.reach - a.longest + 1 + r : 0;
      store_row(row.data(), a.width, dtype, (line * a.heads + head) * a.width,
                to.mutable_data_ptr());
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> session_attention_bwd_cpu(
    const Tensor& dout_in, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse_in,
    const Tensor& offsets, const std::optional<Tensor>& rows, const std::optional<Tensor>& keys,
    const std::optional<Tensor>& key_bias, const std::optional<Tensor>& position_bias, bool causal,
    double scale, double dropout, const std::optional<Tensor>& seed, int64_t site) {
  Problem problem(q, k, v, offsets, rows, keys, key_bias, position_bias, causal, scale, dropout,
                  seed, site);
  const Attention& a = problem.a;
  const ScalarType sums = problem.is_double() ? ScalarType::Double : ScalarType::Float;
  CHECK(dout_in.dim() == 3 && dout_in.size(0) == problem.queries && dout_in.size(1) == a.heads &&
            dout_in.size(2) == a.width && dout_in.scalar_type() == problem.type,
        kOp, ": dout must have the shape and the dtype of q");
  CHECK(lse_in.dim() == 2 && lse_in.size(0) == problem.queries && lse_in.size(1) == a.heads &&
            lse_in.scalar_type() == sums,
        kOp, ": lse must be forward's, (R, H)");
  const Tensor dout = with_unit_elements(dout_in), lse = torch::stable::contiguous(lse_in);
  const auto like = [&](const std::optional<Tensor>& given) {
    return given.has_value() ? torch::stable::new_zeros(*given, given->sizes())
                             : torch::stable::new_empty(q, {0});
  };
  Tensor dq = torch::stable::new_empty(q, {problem.queries, a.heads, a.width});
  Tensor dk = torch::stable::new_empty(k, {problem.items, a.heads, a.width});
  Tensor dv = torch::stable::new_empty(v, {problem.items, a.heads, a.width});
  Tensor dkeys = like(keys), dkey_bias = like(key_bias), dposition_bias = like(position_bias);
  zero_rows(problem.skipped, dq, a.heads * a.width);
  std::vector<int64_t> unused;
  for (int64_t i = problem.offsets.back(); i < problem.items; ++i) unused.push_back(i);
  zero_rows(unused, dk, a.heads * a.width);
  zero_rows(unused, dv, a.heads * a.width);
  const Heads given{{dout.const_data_ptr(), dout.stride(0), dtype_of(kOp, "dout", dout)},
                    dout.stride(1)};
  if (problem.is_double()) {
    backward<double>(problem, given, lse, dq, dk, dv, dkeys, dkey_bias, dposition_bias);
  } else {
    backward<float>(problem, given, lse, dq, dk, dv, dkeys, dkey_bias, dposition_bias);
  }
  return {dq, dk, dv, dkeys, dkey_bias, dposition_bias};
}

}  // namespace
}  // namespace t4r_fast

STABLE_TORCH_LIBRARY_IMPL(t4r_fast, CPU, m) {
  m.impl("session_attention_fwd", TORCH_BOX(&t4r_fast::session_attention_fwd_cpu));
  m.impl("session_attention_bwd", TORCH_BOX(&t4r_fast::session_attention_bwd_cpu));
}
