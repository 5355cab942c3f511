// Block-sparse attention on CPU: FlashAttention-2's loops over lists of blocks.
//
// I is the type of q, k and v, T that of the arithmetic (float or double), E that in which the operands of q k^T and
// dout v^T are multiplied: T, or bfloat16 where the inputs are and the processor has an instruction for it. Products of
// two bfloat16 are exact in float, so that this is the same arithmetic in half the time.
//
// Tensors of tokens are [batch, seq, heads, head_dim]. "head" counts batch * kv_heads. The rows of a query block are its
// (token, head of the group) pairs, token first. Sums are in one order for any number of threads.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>
#include <type_traits>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using at::native::cpublas::brgemm;

constexpr int64_t ROWS = 128;  // of a tile: what a thread has in hand is half a megabyte with 128 keys
constexpr double LOWEST = -1e30;  // a running maximum before the first key: finite, so that exp(-inf - LOWEST) = 0

#ifdef __AVX512BF16__
constexpr bool MULTIPLIES_BFLOAT16 = true;
#else
constexpr bool MULTIPLIES_BFLOAT16 = false;
#endif

// oneDNN's kernels reach twice MKL's speed on AMD processors. Not every processor has them.
bool has_brgemm() {
  static const bool has = [] {
    float x = 1, y = 0;
    try {
      brgemm(1, 1, 1, 1, 1, 1, false, &x, &x, &y, false);
      return true;
    } catch (const c10::Error&) {
      return false;
    }
  }();
  return has;
}

// C [m, n] (+)= A [m, k] B [k, n], all row-major and dense.
template <typename T>
void gemm(int64_t m, int64_t n, int64_t k, const T* __restrict a, const T* __restrict b, T* __restrict c, bool add) {
  if constexpr (std::is_same_v<T, float>) {
    if (has_brgemm()) return brgemm(m, n, k, k, n, n, add, a, b, c, false);
  }
  for (int64_t i = 0; i < m; ++i, c += n, a += k) {
    if (!add) std::fill(c, c + n, T(0));
    for (int64_t p = 0; p < k; ++p)
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) c[j] += a[p] * b[p * n + j];
  }
}

// The same, where B is [k / 2, n, 2]: what ``turn`` makes.
void gemm(int64_t m, int64_t n, int64_t k, const BFloat16* a, const BFloat16* b, float* c, bool add) {
  brgemm(m, n, k, k, n, n, add, a, b, c, true);
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

// [rows, columns] -> the second operand [columns, rows] of ``gemm``.
template <typename E>
void turn(const E* source, int64_t rows, int64_t columns, E* target) {
  using Unit = std::conditional_t<std::is_same_v<E, BFloat16>, uint32_t, E>;  // of bfloat16 pairs stay together
  transpose(reinterpret_cast<const Unit*>(source), rows, static_cast<int64_t>(columns * sizeof(E) / sizeof(Unit)),
            reinterpret_cast<Unit*>(target), rows);
}

template <typename A, typename B>
void convert(const A* source, int64_t n, B* target) {
  for (int64_t i = 0; i < n; ++i) target[i] = static_cast<B>(source[i]);
}

struct Problem {
  int64_t heads, kv_heads, group, head_dim;  // heads: batch * kv_heads
  int64_t queries, keys, q_blocks, k_blocks, query_block, block;
  bool causal;
  double scale;
  const int64_t* documents;  // [batch, keys] or null

  // How many keys of block kb, from its first, can the query at ``position`` see?
  int64_t limit(int64_t kb, int64_t position) const {
    int64_t end = causal ? std::min(keys, position + 1) : keys;
    return std::clamp<int64_t>(end - kb * block, 0, block);
  }
  int64_t position(int64_t qb, int64_t row) const { return keys - queries + qb * query_block + row / group; }
  bool sees(int64_t head, int64_t kb, int64_t column, int64_t position) const {
    const int64_t* ids = documents + head / kv_heads * keys;
    return ids[kb * block + column] == ids[position];
  }
  int64_t rows(int64_t qb) const { return std::min(query_block, queries - qb * query_block) * group; }

  // Calls f(row of [batch, queries, heads], n, where) for rows [first, first + count) of a query block, in runs of n
  // that lie together; ``where`` counts from first.
  template <typename F>
  void runs(int64_t head, int64_t qb, int64_t first, int64_t count, const F& f) const {
    for (int64_t row = first; row < first + count;) {
      int64_t n = std::min(group - row % group, first + count - row);
      int64_t token = head / kv_heads * queries + qb * query_block + row / group;
      f((token * kv_heads + head % kv_heads) * group + row % group, n, row - first);
      row += n;
    }
  }
  template <typename A, typename B>
  void gather(const A* x, int64_t head, int64_t qb, int64_t first, int64_t count, B* rows) const {
    runs(head, qb, first, count, [&](int64_t at, int64_t n, int64_t where) {
      convert(x + at * head_dim, n * head_dim, rows + where * head_dim);
    });
  }
};

// Calls task(i) for every i, each on one thread; the next free thread takes the next task.
template <typename F>
void for_each(int64_t tasks, const F& task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) task(i);
    if (MULTIPLIES_BFLOAT16) at::native::cpublas::brgemm_release();
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

template <typename T>
at::TensorOptions like(const Tensor& x) {
  return x.options().dtype(c10::CppTypeToScalarType<T>::value);
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

// [batch, keys, kv_heads, head_dim] -> [heads, k_blocks, block, head_dim], the last block filled up with zeros; turned:
// [.., head_dim, block], the second operand of ``gemm``.
template <typename I, typename E>
Tensor key_blocks(const Problem& p, const Tensor& x, bool turned = false) {
  Tensor blocks = at::empty({p.heads, p.k_blocks, p.block, p.head_dim}, like<E>(x));
  const I* source = pointer<I>(x);
  E* target = blocks.mutable_data_ptr<E>();
  for_each(p.heads * p.k_blocks, [&](int64_t task) {
    int64_t head = task / p.k_blocks, first = task % p.k_blocks * p.block, size = p.block * p.head_dim;
    thread_local std::vector<E> buffer;
    buffer.resize(size);
    E* rows = turned ? buffer.data() : target + task * size;
    for (int64_t j = 0; j < p.block; ++j, rows += p.head_dim) {
      int64_t at = (head / p.kv_heads * p.keys + first + j) * p.kv_heads + head % p.kv_heads;
      if (first + j < p.keys)
        convert(source + at * p.head_dim, p.head_dim, rows);
      else
        std::fill_n(rows, p.head_dim, E(0));
    }
    if (turned) turn(buffer.data(), p.block, p.head_dim, target + task * size);
  });
  return blocks;
}

// One tile's q k^T [rows, block], -inf where a query does not see a key: rows from ``first`` of query block qb.
template <typename T, typename E>
void products(const Problem& p, const E* q, const E* kt, int64_t head, int64_t qb, int64_t first, int64_t rows,
              int64_t kb, T* logits) {
  gemm(rows, p.block, p.head_dim, q, kt + (head * p.k_blocks + kb) * p.head_dim * p.block, logits, false);
  if (!p.documents && p.limit(kb, p.position(qb, first)) == p.block) return;
  constexpr T hidden = -std::numeric_limits<T>::infinity();
  for (int64_t r = 0; r < rows; ++r, logits += p.block) {
    int64_t position = p.position(qb, first + r), limit = p.limit(kb, position);
    std::fill(logits + limit, logits + p.block, hidden);
    if (p.documents)
      for (int64_t j = 0; j < limit; ++j) logits[j] = p.sees(head, kb, j, position) ? logits[j] : hidden;
  }
}

template <typename I, typename T, typename E>
void forward(const Problem& p, const Lists& lists, const I* q, const E* kt, const T* v, const T* bias, I* out,
             T* lse) {
  for_each(p.heads * p.q_blocks, [&](int64_t task) {
    int64_t head = task / p.q_blocks, qb = task % p.q_blocks, d = p.head_dim, w = p.block;
    thread_local std::vector<T> buffer;
    thread_local std::vector<E> rows_q;
    buffer.resize(ROWS * (w + d));
    rows_q.resize(ROWS * d);
    T *logits = buffer.data(), *sums = logits + ROWS * w, highest[ROWS], total[ROWS], scale = p.scale;
    for (int64_t first = 0; first < p.rows(qb); first += ROWS) {
      int64_t rows = std::min(ROWS, p.rows(qb) - first);
      p.gather(q, head, qb, first, rows, rows_q.data());
      std::fill_n(sums, rows * d, T(0));
      std::fill_n(highest, rows, T(LOWEST));
      std::fill_n(total, rows, T(0));
      for (int32_t i = 0; i < lists.count[task]; ++i) {
        int64_t kb = lists.index[task * lists.longest + i];
        T b = bias ? bias[task * p.k_blocks + kb] : T(0);
        products(p, rows_q.data(), kt, head, qb, first, rows, kb, logits);
        for (int64_t r = 0; r < rows; ++r) {
          T *row = logits + r * w, most = highest[r], more = 0;
#pragma omp simd reduction(max : most)
          for (int64_t j = 0; j < w; ++j) most = std::max(most, row[j] * scale + b);
#pragma omp simd reduction(+ : more)
          for (int64_t j = 0; j < w; ++j) {
            row[j] = exponential(row[j] * scale + b - most);
            more += row[j];
          }
          T shrink = exponential(highest[r] - most);
          total[r] = total[r] * shrink + more;
          if (highest[r] != most)
            for (int64_t j = 0; j < d; ++j) sums[r * d + j] *= shrink;
          highest[r] = most;
        }
        gemm(rows, d, w, logits, v + (head * p.k_blocks + kb) * w * d, sums, true);
      }
      p.runs(head, qb, first, rows, [&](int64_t at, int64_t n, int64_t where) {
        for (int64_t r = where; r < where + n; ++r, ++at) {
          T inverse = total[r] > 0 ? 1 / total[r] : T(0);
          for (int64_t j = 0; j < d; ++j) out[at * d + j] = static_cast<I>(sums[r * d + j] * inverse);
          lse[at] = total[r] > 0 ? highest[r] + std::log(total[r]) : -std::numeric_limits<T>::infinity();
        }
      });
    }
  });
}

// The share of its weights that a row gives to each listed key block, the largest of the rows of a query block.
template <typename I, typename T, typename E>
void masses(const Problem& p, const Lists& lists, const I* q, const E* kt, const T* lse, T* mass) {
  for_each(p.heads * p.q_blocks, [&](int64_t task) {
    int64_t head = task / p.q_blocks, qb = task % p.q_blocks, w = p.block;
    thread_local std::vector<T> buffer;
    thread_local std::vector<E> rows_q;
    buffer.resize(ROWS * w);
    rows_q.resize(ROWS * p.head_dim);
    T *logits = buffer.data(), shift[ROWS], scale = p.scale;
    for (int64_t first = 0; first < p.rows(qb); first += ROWS) {
      int64_t rows = std::min(ROWS, p.rows(qb) - first);
      p.gather(q, head, qb, first, rows, rows_q.data());
      p.runs(head, qb, first, rows,
             [&](int64_t at, int64_t n, int64_t where) { std::copy_n(lse + at, n, shift + where); });
      for (int32_t i = 0; i < lists.count[task]; ++i) {
        T& largest = mass[task * lists.longest + i];
        products(p, rows_q.data(), kt, head, qb, first, rows, lists.index[task * lists.longest + i], logits);
        for (int64_t r = 0; r < rows; ++r) {
          T total = 0;
#pragma omp simd reduction(+ : total)
          for (int64_t j = 0; j < w; ++j) total += exponential(logits[r * w + j] * scale - shift[r]);
          largest = std::max(largest, total);
        }
      }
    }
  });
}

// delta = dO O - dlse of every row: what the sum of its weights takes from each logit's gradient.
template <typename I, typename T>
void deltas(int64_t rows, int64_t d, const I* out, const I* dout, const T* dlse, T* delta) {
  at::parallel_for(0, rows, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < d; ++j) sum += static_cast<T>(dout[r * d + j]) * static_cast<T>(out[r * d + j]);
      delta[r] = sum - dlse[r];
    }
  });
}

// For each entry of the inverse lists: how many key blocks before it are in the query block's list.
std::vector<int32_t> ranks(const Problem& p, const Lists& inverse) {
  std::vector<int32_t> rank(p.heads * p.k_blocks * inverse.longest), seen(p.heads * p.q_blocks);
  for (int64_t task = 0; task < p.heads * p.k_blocks; ++task)
    for (int64_t at = task * inverse.longest; at < task * inverse.longest + inverse.count[task]; ++at)
      rank[at] = seen[task / p.k_blocks * p.q_blocks + inverse.index[at]]++;
  return rank;
}

// Key block by key block, over the rows of all query blocks that list it: a pair's logit is made once. Tiles are
// [keys, rows], so that no product needs a tile turned. A task owns its key block's dk and dv, and adds to the dq of a
// query block when the key blocks before it have: these are in the hands of threads that wait for none after them.
template <typename I, typename T, typename E>
void backward(const Problem& p, const Lists& inverse, const I* q, const E* k, const T* kt, const E* v, const T* bias,
              const I* dout, const T* lse, const T* delta, T* dq, I* dk, I* dv, T* dbias) {
  std::vector<int32_t> rank = ranks(p, inverse);
  std::vector<std::atomic<int32_t>> turn_of(p.heads * p.q_blocks);
  for_each(p.heads * p.k_blocks, [&](int64_t ticket) {
    int64_t head = ticket % p.heads, kb = ticket / p.heads, d = p.head_dim, w = p.block;
    int64_t task = head * p.k_blocks + kb, at = task * w * d;
    thread_local std::vector<T> buffer;
    thread_local std::vector<E> operands;
    buffer.resize(ROWS * (4 * d + 2 * w) + 2 * w * d);
    operands.resize(ROWS * 4 * d);
    T *rows_q = buffer.data(), *rows_dout = rows_q + ROWS * d, *turned_dq = rows_dout + ROWS * d;
    T *rows_dq = turned_dq + ROWS * d, *weights = rows_dq + ROWS * d, *dlogits = weights + ROWS * w;
    T *block_dk = dlogits + ROWS * w, *block_dv = block_dk + w * d, scale = p.scale;
    E *left_q = operands.data(), *left_dout = left_q + ROWS * d, *turned_q = left_dout + ROWS * d;
    E* turned_dout = turned_q + ROWS * d;
    T rows_bias[ROWS], rows_lse[ROWS], rows_delta[ROWS], rows_dbias[ROWS];
    int64_t limits[ROWS], positions[ROWS];
    struct Part {
      int64_t qb, first, begin, n;  // rows from ``begin`` of the tile are those from ``first`` of a query block
      int32_t rank;
    } parts[ROWS];
    std::fill_n(block_dk, 2 * w * d, T(0));
    const int32_t *list = inverse.index + task * inverse.longest, *end = list + inverse.count[task];
    const int32_t* place = rank.data() + task * inverse.longest;
    int64_t first = 0;  // row of the block *list
    while (list != end) {
      int64_t rows = 0, count = 0;
      bool partly = p.documents != nullptr;
      while (list != end && rows < ROWS) {
        int64_t qb = *list, n = std::min(ROWS - rows, p.rows(qb) - first);
        if constexpr (!std::is_same_v<E, T>) {
          p.gather(q, head, qb, first, n, left_q + rows * d);
          p.gather(dout, head, qb, first, n, left_dout + rows * d);
        }
        p.gather(q, head, qb, first, n, rows_q + rows * d);
        p.gather(dout, head, qb, first, n, rows_dout + rows * d);
        p.runs(head, qb, first, n, [&](int64_t from, int64_t run, int64_t where) {
          std::copy_n(lse + from, run, rows_lse + rows + where);
          std::copy_n(delta + from, run, rows_delta + rows + where);
        });
        std::fill_n(rows_bias + rows, n, bias ? bias[(head * p.q_blocks + qb) * p.k_blocks + kb] : T(0));
        for (int64_t r = 0; r < n; ++r) {
          positions[rows + r] = p.position(qb, first + r);
          limits[rows + r] = p.limit(kb, positions[rows + r]);
          partly = partly || limits[rows + r] < w;
        }
        parts[count++] = {qb, first, rows, n, *place};
        rows += n;
        first += n;
        if (first == p.rows(qb)) first = 0, ++list, ++place;
      }
      int64_t wide = (rows + 31) / 32 * 32, rest = wide - rows;  // few sizes: a kernel is compiled for each
      std::fill_n(rows_q + rows * d, rest * d, T(0));
      std::fill_n(rows_dout + rows * d, rest * d, T(0));
      std::fill_n(rows_lse + rows, rest, std::numeric_limits<T>::infinity());
      std::fill_n(rows_delta + rows, rest, T(0));
      std::fill_n(rows_bias + rows, rest, T(0));
      for (int64_t r = 0; r < rows; ++r)  // sees no key: exp(logit - inf) = 0
        if (rows_lse[r] == -std::numeric_limits<T>::infinity()) rows_lse[r] = std::numeric_limits<T>::infinity();
      if constexpr (std::is_same_v<E, T>) {
        turn(rows_q, wide, d, turned_q);
        turn(rows_dout, wide, d, turned_dout);
      } else {
        std::fill_n(left_q + rows * d, rest * d, E(0));
        std::fill_n(left_dout + rows * d, rest * d, E(0));
        turn(left_q, wide, d, turned_q);
        turn(left_dout, wide, d, turned_dout);
      }
      gemm(w, wide, d, k + at, turned_q, weights, false);
      gemm(w, wide, d, v + at, turned_dout, dlogits, false);
      for (int64_t j = 0; j < w; ++j) {
        T *x = weights + j * wide, *dx = dlogits + j * wide;
#pragma omp simd
        for (int64_t r = 0; r < wide; ++r) {
          x[r] = exponential(x[r] * scale + rows_bias[r] - rows_lse[r]);
          dx[r] = x[r] * (dx[r] - rows_delta[r]);
        }
        if (partly)
          for (int64_t r = 0; r < rows; ++r)
            if (j >= limits[r] || (p.documents && !p.sees(head, kb, j, positions[r]))) x[r] = dx[r] = 0;
      }
      gemm(w, d, wide, weights, rows_dout, block_dv, true);
      gemm(w, d, wide, dlogits, rows_q, block_dk, true);
      gemm(d, wide, w, kt + at, dlogits, turned_dq, false);
      transpose(turned_dq, d, wide, rows_dq, d);
      if (dbias) {
        std::fill_n(rows_dbias, rows, T(0));
        for (int64_t j = 0; j < w; ++j)
          for (int64_t r = 0; r < rows; ++r) rows_dbias[r] += dlogits[j * wide + r];
      }
      for (const Part* part = parts; part != parts + count; ++part) {
        int64_t owner = head * p.q_blocks + part->qb;
        while (turn_of[owner].load(std::memory_order_acquire) != part->rank) std::this_thread::yield();
        p.runs(head, part->qb, part->first, part->n, [&](int64_t to, int64_t run, int64_t where) {
          const T* source = rows_dq + (part->begin + where) * d;
          for (int64_t i = 0; i < run * d; ++i) dq[to * d + i] += source[i] * scale;
        });
        if (dbias) {
          T& sum = dbias[owner * p.k_blocks + kb];
          sum = std::accumulate(rows_dbias + part->begin, rows_dbias + part->begin + part->n, sum);
        }
        if (part->first + part->n == p.rows(part->qb)) turn_of[owner].store(part->rank + 1, std::memory_order_release);
      }
    }
    for (int64_t j = 0; j < std::min(w, p.keys - kb * w); ++j) {
      int64_t to = (((head / p.kv_heads * p.keys) + kb * w + j) * p.kv_heads + head % p.kv_heads) * d;
      for (int64_t i = 0; i < d; ++i) dk[to + i] = static_cast<I>(block_dk[j * d + i] * scale);
      convert(block_dv + j * d, d, dv + to);
    }
  });
}

// Calls f<I, T, E>().
template <typename F>
void dispatch(const Tensor& q, const F& f) {
  switch (q.scalar_type()) {
    case at::kDouble: return f.template operator()<double, double, double>();
    case at::kFloat: return f.template operator()<float, float, float>();
    case at::kHalf: return f.template operator()<at::Half, float, float>();
    case at::kBFloat16:
      if constexpr (MULTIPLIES_BFLOAT16)
        if (q.size(3) % 2 == 0 && has_brgemm()) return f.template operator()<BFloat16, float, BFloat16>();
      return f.template operator()<BFloat16, float, float>();
    default: TORCH_CHECK(false, "not a float type: ", q.scalar_type());
  }
}

Problem problem(const Tensor& q, const Tensor& k, int64_t query_block, int64_t block, bool causal, double scale,
                const std::optional<Tensor>& documents) {
  int64_t queries = q.size(1), keys = k.size(1), kv_heads = k.size(2);
  return {q.size(0) * kv_heads,
          kv_heads,
          q.size(2) / kv_heads,
          q.size(3),
          queries,
          keys,
          (queries + query_block - 1) / query_block,
          (keys + block - 1) / block,
          query_block,
          block,
          causal,
          scale,
          pointer<int64_t>(documents)};
}

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias,
                                  const Tensor& count, const Tensor& index, int64_t query_block, int64_t block,
                                  bool causal, double scale, const std::optional<Tensor>& documents) {
  Problem p = problem(q, k, query_block, block, causal, scale, documents);
  Lists lists(count, index);
  lists.check(p);
  Tensor out = at::empty_like(q), lse;
  dispatch(q, [&]<typename I, typename T, typename E>() {
    lse = at::empty(q.sizes().slice(0, 3), like<T>(q));
    Tensor kt = key_blocks<I, E>(p, k, true), values = key_blocks<I, T>(p, v);
    forward(p, lists, pointer<I>(q), pointer<E>(kt), pointer<T>(values), pointer<T>(bias), out.mutable_data_ptr<I>(),
            lse.mutable_data_ptr<T>());
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias, const Tensor& out,
    const Tensor& lse, const Tensor& dout, const Tensor& dlse, const Tensor& inverse_count, const Tensor& inverse_index,
    int64_t query_block, int64_t block, bool causal, double scale, const std::optional<Tensor>& documents) {
  Problem p = problem(q, k, query_block, block, causal, scale, documents);
  Tensor dq, dk = at::empty_like(k), dv = at::empty_like(v), delta = at::empty_like(lse);
  Tensor dbias = bias ? at::zeros_like(*bias) : Tensor();
  dispatch(q, [&]<typename I, typename T, typename E>() {
    dq = at::zeros(q.sizes(), like<T>(q));
    Tensor keys = key_blocks<I, E>(p, k), kt = key_blocks<I, T>(p, k, true), values = key_blocks<I, E>(p, v);
    deltas(lse.numel(), p.head_dim, pointer<I>(out), pointer<I>(dout), pointer<T>(dlse), delta.mutable_data_ptr<T>());
    backward(p, Lists(inverse_count, inverse_index), pointer<I>(q), pointer<E>(keys), pointer<T>(kt),
             pointer<E>(values), pointer<T>(bias), pointer<I>(dout), pointer<T>(lse), pointer<T>(delta),
             dq.mutable_data_ptr<T>(), dk.mutable_data_ptr<I>(), dv.mutable_data_ptr<I>(),
             bias ? dbias.mutable_data_ptr<T>() : nullptr);
  });
  return {dq, dk, dv, dbias};
}

Tensor block_mass(const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& count, const Tensor& index,
                  int64_t query_block, int64_t block, bool causal, double scale,
                  const std::optional<Tensor>& documents) {
  Problem p = problem(q, k, query_block, block, causal, scale, documents);
  Lists lists(count, index);
  lists.check(p);
  Tensor mass = at::zeros_like(index, lse.options());
  dispatch(q, [&]<typename I, typename T, typename E>() {
    Tensor kt = key_blocks<I, E>(p, k, true);
    masses(p, lists, pointer<I>(q), pointer<E>(kt), pointer<T>(lse), mass.mutable_data_ptr<T>());
  });
  return mass;
}

}  // namespace

TORCH_LIBRARY(megasparse_block_sparse, m) {
  m.def("attend", &attend);
  m.def("attend_backward", &attend_backward);
  m.def("block_mass", &block_mass);
}
