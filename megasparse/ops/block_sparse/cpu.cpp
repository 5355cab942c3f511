// Block-sparse attention on CPU: FlashAttention-2's three loops over lists of blocks, in float or double.
//
// The rows of a query block are its (token, head of the group) pairs, token first. Each task owns what it writes, so
// results are the same to the bit for any number of threads. See cpu.py for the layout of the arguments.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t ROWS = 256;  // of a tile: with 128 keys its logits are 128 KiB and stay in the second cache
constexpr double LOWEST = -1e30;  // a running maximum before the first key: finite, so that exp(-inf - LOWEST) = 0

// C [m, n] (+)= A [m, k] B [k, n], all row-major and dense.
template <typename T>
void gemm(int64_t m, int64_t n, int64_t k, const T* __restrict a, const T* __restrict b, T* __restrict c, bool add) {
  if constexpr (std::is_same_v<T, float>) {
    // oneDNN's kernels reach twice MKL's speed on AMD processors. Not every processor has them.
    static const bool brgemm = [] {
      float x = 1, y = 0;
      try {
        at::native::cpublas::brgemm(1, 1, 1, 1, 1, 1, false, &x, &x, &y, false);
        return true;
      } catch (const c10::Error&) {
        return false;
      }
    }();
    if (brgemm) return at::native::cpublas::brgemm(m, n, k, k, n, n, add, a, b, c, false);
  }
  for (int64_t i = 0; i < m; ++i, c += n, a += k) {
    if (!add) std::fill(c, c + n, T(0));
    for (int64_t p = 0; p < k; ++p)
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) c[j] += a[p] * b[p * n + j];
  }
}

// exp to one unit in the last place: Cody and Waite's reduction, Cephes' polynomial; 0 below the least normal number.
inline float exponential(float x) {
  float n = std::nearbyint(x * 1.44269504088896341f);
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -87.0f ? 0.0f : p * power;
}

inline double exponential(double x) { return std::exp(x); }

template <typename T>
void transpose(const T* source, int64_t rows, int64_t columns, T* target, int64_t width) {
  for (int64_t r0 = 0; r0 < rows; r0 += 16)
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t r = r0; r < std::min(r0 + 16, rows); ++r) target[c * width + r] = source[r * columns + c];
}

struct Problem {
  int64_t heads, q_blocks, k_blocks, rows, group, head_dim, block;  // heads: batch * kv_heads
  int64_t kv_heads, query_block, keys, offset;  // offset: position of the first query
  bool causal;
  const int64_t* documents;  // [batch, keys] or null

  // How many keys of block kb, from its first, can the query at ``position`` see?
  int64_t limit(int64_t kb, int64_t position) const {
    int64_t end = causal ? std::min(keys, position + 1) : keys;
    return std::clamp<int64_t>(end - kb * block, 0, block);
  }
  int64_t position(int64_t qb, int64_t row) const { return offset + qb * query_block + row / group; }
  bool sees(int64_t head, int64_t kb, int64_t column, int64_t position) const {
    const int64_t* ids = documents + head / kv_heads * keys;
    return ids[kb * block + column] == ids[std::min(position, keys - 1)];
  }
};

// -inf in logits [rows, block] where a query does not see a key.
template <typename T>
void hide(const Problem& p, T* logits, int64_t head, int64_t qb, int64_t first, int64_t rows, int64_t kb) {
  constexpr T hidden = -std::numeric_limits<T>::infinity();
  for (int64_t r = 0; r < rows; ++r) {
    int64_t position = p.position(qb, first + r), limit = p.limit(kb, position);
    T* row = logits + r * p.block;
    std::fill(row + limit, row + p.block, hidden);
    if (p.documents)
      for (int64_t j = 0; j < limit; ++j) row[j] = p.sees(head, kb, j, position) ? row[j] : hidden;
  }
}

// Calls task(i) for every i, each on one thread; the next free thread takes the next task.
template <typename F>
void for_each(int64_t tasks, const F& task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) task(i);
  });
}

template <typename T>
const T* pointer(const Tensor& tensor) {
  TORCH_CHECK(tensor.is_contiguous());
  return tensor.const_data_ptr<T>();
}

template <typename T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

struct Lists {
  const int32_t *count, *index;
  int64_t longest;
  explicit Lists(const Tensor& count_, const Tensor& index_)
      : count(pointer<int32_t>(count_)), index(pointer<int32_t>(index_)), longest(index_.size(-1)) {}

  // A list that is too long, or names a block that is not there or is named already, would be read as other memory.
  void check(const Problem& p) const {
    std::vector<int64_t> named(p.k_blocks, -1);
    for (int64_t task = 0; task < p.heads * p.q_blocks; ++task) {
      int64_t head = task / p.q_blocks;
      auto where = [&] {
        return c10::str("mask: the list of batch ", head / p.kv_heads, ", K/V head ", head % p.kv_heads, ", query block ",
                        task % p.q_blocks);
      };
      TORCH_CHECK_VALUE(count[task] >= 0 && count[task] <= longest, where(), " has count ", count[task],
                        " and room for ", longest);
      for (int32_t i = 0; i < count[task]; ++i) {
        int32_t kb = index[task * longest + i];
        TORCH_CHECK_VALUE(kb >= 0 && kb < p.k_blocks, where(), " names key block ", kb, " of ", p.k_blocks);
        TORCH_CHECK_VALUE(named[kb] != task, where(), " names key block ", kb, " twice");
        named[kb] = task;
      }
    }
  }
};

// One tile's logits [rows, block]: the queries from ``first`` of query block qb, key block kb.
template <typename T>
void logits_of(const Problem& p, const T* q, const T* kt, const T* bias, int64_t head, int64_t qb, int64_t first,
               int64_t rows, int64_t kb, T* logits) {
  gemm(rows, p.block, p.head_dim, q + ((head * (p.q_blocks) + qb) * p.rows + first) * p.head_dim,
       kt + (head * p.k_blocks + kb) * p.head_dim * p.block, logits, false);
  if (bias) {
    T b = bias[(head * p.q_blocks + qb) * p.k_blocks + kb];
    for (int64_t i = 0; i < rows * p.block; ++i) logits[i] += b;
  }
  if (p.documents || p.limit(kb, p.position(qb, first)) < p.block) hide(p, logits, head, qb, first, rows, kb);
}

template <typename T>
void forward(const Problem& p, const Lists& lists, const T* q, const T* kt, const T* v, const T* bias, T* out,
             T* lse) {
  for_each(p.heads * p.q_blocks, [&](int64_t task) {
    int64_t head = task / p.q_blocks, qb = task % p.q_blocks, d = p.head_dim, w = p.block;
    thread_local std::vector<T> buffer;
    buffer.resize(ROWS * w);
    T *logits = buffer.data(), highest[ROWS], sum[ROWS];
    for (int64_t first = 0; first < p.rows; first += ROWS) {
      int64_t rows = std::min(ROWS, p.rows - first), row0 = task * p.rows + first;
      std::fill(highest, highest + rows, T(LOWEST));
      std::fill(sum, sum + rows, T(0));
      for (int32_t i = 0; i < lists.count[task]; ++i) {
        int64_t kb = lists.index[task * lists.longest + i];
        logits_of(p, q, kt, bias, head, qb, first, rows, kb, logits);
        for (int64_t r = 0; r < rows; ++r) {
          T *row = logits + r * w, most = highest[r], total = 0;
#pragma omp simd reduction(max : most)
          for (int64_t j = 0; j < w; ++j) most = std::max(most, row[j]);
#pragma omp simd reduction(+ : total)
          for (int64_t j = 0; j < w; ++j) {
            row[j] = exponential(row[j] - most);
            total += row[j];
          }
          T shrink = exponential(highest[r] - most);
          sum[r] = sum[r] * shrink + total;
          if (highest[r] != most) {
            T* o = out + (row0 + r) * d;
            for (int64_t j = 0; j < d; ++j) o[j] *= shrink;
          }
          highest[r] = most;
        }
        gemm(rows, d, w, logits, v + (head * p.k_blocks + kb) * w * d, out + row0 * d, true);
      }
      for (int64_t r = 0; r < rows; ++r) {
        T inverse = sum[r] > 0 ? 1 / sum[r] : T(0), *o = out + (row0 + r) * d;
        for (int64_t j = 0; j < d; ++j) o[j] *= inverse;
        lse[row0 + r] = sum[r] > 0 ? highest[r] + std::log(sum[r]) : -std::numeric_limits<T>::infinity();
      }
    }
  });
}

// The share of its weights that a row gives to each listed key block, the largest of the rows of a query block.
template <typename T>
void masses(const Problem& p, const Lists& lists, const T* q, const T* kt, const T* lse, T* mass) {
  for_each(p.heads * p.q_blocks, [&](int64_t task) {
    int64_t head = task / p.q_blocks, qb = task % p.q_blocks, w = p.block;
    thread_local std::vector<T> buffer;
    buffer.resize(ROWS * w);
    T* logits = buffer.data();
    for (int64_t first = 0; first < p.rows; first += ROWS) {
      int64_t rows = std::min(ROWS, p.rows - first);
      for (int32_t i = 0; i < lists.count[task]; ++i) {
        T& largest = mass[task * lists.longest + i];
        logits_of<T>(p, q, kt, nullptr, head, qb, first, rows, lists.index[task * lists.longest + i], logits);
        for (int64_t r = 0; r < rows; ++r) {
          T total = 0, shift = lse[task * p.rows + first + r];
#pragma omp simd reduction(+ : total)
          for (int64_t j = 0; j < w; ++j) total += exponential(logits[r * w + j] - shift);
          largest = std::max(largest, total);
        }
      }
    }
  });
}

// delta = dO O - dlse of every row: what the sum of its weights takes from each logit's gradient.
template <typename T>
void deltas(const Problem& p, const T* out, const T* dout, const T* dlse, T* delta) {
  for_each(p.heads * p.q_blocks, [&](int64_t task) {
    for (int64_t r = task * p.rows; r < (task + 1) * p.rows; ++r) {
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < p.head_dim; ++j) sum += dout[r * p.head_dim + j] * out[r * p.head_dim + j];
      delta[r] = sum - dlse[r];
    }
  });
}

template <typename T>
void backward_queries(const Problem& p, const Lists& lists, const T* q, const T* k, const T* kt, const T* vt,
                      const T* bias, const T* dout, const T* lse, const T* delta, T* dq, T* dbias) {
  for_each(p.heads * p.q_blocks, [&](int64_t task) {
    int64_t head = task / p.q_blocks, qb = task % p.q_blocks, d = p.head_dim, w = p.block;
    thread_local std::vector<T> buffer;
    buffer.resize(2 * ROWS * w);
    T *weights = buffer.data(), *dlogits = weights + ROWS * w;
    for (int64_t first = 0; first < p.rows; first += ROWS) {
      int64_t rows = std::min(ROWS, p.rows - first), row0 = task * p.rows + first;
      for (int32_t i = 0; i < lists.count[task]; ++i) {
        int64_t kb = lists.index[task * lists.longest + i], at = (head * p.k_blocks + kb) * d * w;
        logits_of(p, q, kt, bias, head, qb, first, rows, kb, weights);
        gemm(rows, w, d, dout + row0 * d, vt + at, dlogits, false);
        T all = 0;
        for (int64_t r = 0; r < rows; ++r) {
          T *x = weights + r * w, *dx = dlogits + r * w, l = lse[row0 + r], shift = delta[row0 + r], total = 0;
#pragma omp simd reduction(+ : total)
          for (int64_t j = 0; j < w; ++j) {
            dx[j] = exponential(x[j] - l) * (dx[j] - shift);
            total += dx[j];
          }
          all += total;
        }
        if (dbias) dbias[task * p.k_blocks + kb] += all;
        gemm(rows, d, w, dlogits, k + at, dq + row0 * d, true);
      }
    }
  });
}

// Tiles are [keys, rows] here, so that no matmul needs a transposed operand but the rows' own.
template <typename T>
void backward_keys(const Problem& p, const Lists& lists, const T* q, const T* k, const T* v, const T* bias,
                   const T* dout, const T* lse, const T* delta, T* dk, T* dv) {
  for_each(p.heads * p.k_blocks, [&](int64_t task) {
    int64_t head = task / p.k_blocks, kb = task % p.k_blocks, d = p.head_dim, w = p.block;
    thread_local std::vector<T> buffer;
    buffer.resize(ROWS * (4 * d + 2 * w + 3));
    T *rows_q = buffer.data(), *rows_dout = rows_q + ROWS * d, *turned_q = rows_dout + ROWS * d;
    T *turned_dout = turned_q + ROWS * d, *weights = turned_dout + ROWS * d, *dlogits = weights + ROWS * w;
    T *rows_lse = dlogits + ROWS * w, *rows_delta = rows_lse + ROWS, *rows_bias = rows_delta + ROWS;
    int64_t limits[ROWS], positions[ROWS];

    const int32_t *list = lists.index + task * lists.longest, *end = list + lists.count[task];
    int64_t first = 0;  // row of the block *list
    while (list != end) {
      int64_t n = 0;
      bool partly = p.documents != nullptr;
      while (list != end && n < ROWS) {
        int64_t qb = *list, take = std::min(ROWS - n, p.rows - first), from = (head * p.q_blocks + qb) * p.rows + first;
        std::copy_n(q + from * d, take * d, rows_q + n * d);
        std::copy_n(dout + from * d, take * d, rows_dout + n * d);
        std::copy_n(lse + from, take, rows_lse + n);
        std::copy_n(delta + from, take, rows_delta + n);
        std::fill_n(rows_bias + n, take, bias ? bias[(head * p.q_blocks + qb) * p.k_blocks + kb] : T(0));
        for (int64_t r = 0; r < take; ++r) {
          positions[n + r] = p.position(qb, first + r);
          limits[n + r] = p.limit(kb, positions[n + r]);
          partly = partly || limits[n + r] < w;
        }
        n += take;
        first += take;
        if (first == p.rows) first = 0, ++list;
      }
      int64_t wide = (n + 31) / 32 * 32;  // few sizes: a kernel is compiled for each
      std::fill(rows_q + n * d, rows_q + wide * d, T(0));
      std::fill(rows_dout + n * d, rows_dout + wide * d, T(0));
      std::fill(rows_lse + n, rows_lse + wide, std::numeric_limits<T>::infinity());
      std::fill(rows_delta + n, rows_delta + wide, T(0));
      std::fill(rows_bias + n, rows_bias + wide, T(0));
      transpose(rows_q, wide, d, turned_q, wide);
      transpose(rows_dout, wide, d, turned_dout, wide);
      int64_t at = (head * p.k_blocks + kb) * w * d;
      gemm(w, wide, d, k + at, turned_q, weights, false);
      gemm(w, wide, d, v + at, turned_dout, dlogits, false);
      for (int64_t j = 0; j < w; ++j) {
        T *x = weights + j * wide, *dx = dlogits + j * wide;
#pragma omp simd
        for (int64_t r = 0; r < wide; ++r) {
          x[r] = exponential(x[r] + rows_bias[r] - rows_lse[r]);
          dx[r] = x[r] * (dx[r] - rows_delta[r]);
        }
        if (partly)
          for (int64_t r = 0; r < n; ++r)
            if (j >= limits[r] || (p.documents && !p.sees(head, kb, j, positions[r]))) x[r] = dx[r] = 0;
      }
      gemm(w, d, wide, weights, rows_dout, dv + at, true);
      gemm(w, d, wide, dlogits, rows_q, dk + at, true);
    }
  });
}

Problem problem(const Tensor& q, const Tensor& k, int64_t kv_heads, int64_t query_block, int64_t queries, int64_t keys,
                bool causal, const std::optional<Tensor>& documents) {
  // q [batch * kv_heads, q_blocks, rows, head_dim], k [batch * kv_heads, k_blocks, block, head_dim]
  return {q.size(0),   q.size(1), k.size(1),      q.size(2), q.size(2) / query_block,   q.size(3), k.size(2), kv_heads,
          query_block, keys,      keys - queries, causal,    pointer<int64_t>(documents)};
}

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& kt, const Tensor& v,
                                  const Tensor& count, const Tensor& index, const std::optional<Tensor>& bias,
                                  int64_t kv_heads, int64_t query_block, int64_t queries, int64_t keys, bool causal,
                                  const std::optional<Tensor>& documents) {
  Tensor out = at::zeros_like(q), lse = at::empty(q.sizes().slice(0, 3), q.options());
  Problem p = problem(q, k, kv_heads, query_block, queries, keys, causal, documents);
  Lists lists(count, index);
  lists.check(p);
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "block_sparse_attend", [&] {
    using T = scalar_t;
    forward(p, lists, pointer<T>(q), pointer<T>(kt), pointer<T>(v),
            pointer<T>(bias), out.mutable_data_ptr<T>(), lse.mutable_data_ptr<T>());
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_backward(
    const Tensor& q, const Tensor& k, const Tensor& kt, const Tensor& v, const Tensor& vt, const Tensor& count,
    const Tensor& index, const Tensor& inverse_count, const Tensor& inverse_index, const std::optional<Tensor>& bias,
    const Tensor& out, const Tensor& dout, const Tensor& lse, const Tensor& dlse, int64_t kv_heads, int64_t query_block,
    int64_t queries, int64_t keys, bool causal, const std::optional<Tensor>& documents) {
  Tensor dq = at::zeros_like(q), dk = at::zeros_like(k), dv = at::zeros_like(v), delta = at::empty_like(lse);
  Tensor dbias = bias ? at::zeros_like(*bias) : Tensor();
  Problem p = problem(q, k, kv_heads, query_block, queries, keys, causal, documents);
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "block_sparse_attend_backward", [&] {
    using T = scalar_t;
    const T *q_ = pointer<T>(q), *k_ = pointer<T>(k), *v_ = pointer<T>(v);
    const T *dout_ = pointer<T>(dout), *lse_ = pointer<T>(lse);
    T* delta_ = delta.mutable_data_ptr<T>();
    deltas(p, pointer<T>(out), dout_, pointer<T>(dlse), delta_);
    backward_queries(p, Lists(count, index), q_, k_, pointer<T>(kt), pointer<T>(vt), pointer<T>(bias),
                     dout_, lse_, delta_, dq.mutable_data_ptr<T>(), bias ? dbias.mutable_data_ptr<T>() : nullptr);
    backward_keys(p, Lists(inverse_count, inverse_index), q_, k_, v_, pointer<T>(bias), dout_, lse_, delta_,
                  dk.mutable_data_ptr<T>(), dv.mutable_data_ptr<T>());
  });
  return {dq, dk, dv, dbias};
}

Tensor block_mass(const Tensor& q, const Tensor& k, const Tensor& kt, const Tensor& count, const Tensor& index,
                  const Tensor& lse, int64_t kv_heads, int64_t query_block, int64_t queries, int64_t keys, bool causal,
                  const std::optional<Tensor>& documents) {
  Tensor mass = at::zeros_like(index, q.options());
  Problem p = problem(q, k, kv_heads, query_block, queries, keys, causal, documents);
  Lists lists(count, index);
  lists.check(p);
  AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "block_sparse_block_mass", [&] {
    using T = scalar_t;
    masses(p, lists, pointer<T>(q), pointer<T>(kt), pointer<T>(lse), mass.mutable_data_ptr<T>());
  });
  return mass;
}

}  // namespace

TORCH_LIBRARY(megasparse_block_sparse, m) {
  m.def("attend", &attend);
  m.def("attend_backward", &attend_backward);
  m.def("block_mass", &block_mass);
}
