// The full form, where C is W - W0 itself: its squared norm and its gradient.
#pragma once

#include "cpu/kernels.hpp"
#include "cpu/pull_back.hpp"

namespace {

using rpsft::Projection;

constexpr Index full_run = 512;

// A view of W - W0 whose lanes are the rows, or the columns if transposed.
inline View lines_of(const Matrix& weight, const Matrix& base, const rpsft::Cut& cut, bool transposed) {
  View view{weight.data, weight.row_stride, weight.col_stride, base.data, base.row_stride, base.col_stride};
  view.flat_lane = weight.cols;
  view.flat_depth = 1;
  view.begin = cut.head;
  view.end = weight.rows * weight.cols - cut.tail;
  if (transposed) {
    const View as_is = view;
    view.lane_stride = as_is.depth_stride;
    view.depth_stride = as_is.lane_stride;
    view.base_lane_stride = as_is.base_depth_stride;
    view.base_depth_stride = as_is.base_lane_stride;
    view.flat_lane = 1;
    view.flat_depth = weight.cols;
  }
  return view;
}

// Sum of the squares of at most full_run words. Each float32 lane adds at most full_run / width of them.
template <class Lanes>
double run_square(const std::uint32_t* words, Index run) {
  typename Lanes::Vector sums = Lanes::zero();
  Index i = 0;
  for (; i + Lanes::width <= run; i += Lanes::width) {
    const auto values = Float32Word<Lanes>::load(words + i);
    sums = Lanes::multiply_add(values, values, sums);
  }
  float lanes[Lanes::width];
  Lanes::store(lanes, sums);
  double square = 0;
  for (float lane : lanes) square += lane;
  for (; i < run; ++i) square += static_cast<double>(from_bits(words[i])) * from_bits(words[i]);
  return square;
}

template <class Lanes>
void project_full(const Projection& p, double* strip_squares, rpsft::Team& team) {
  using Word = Float32Word<Lanes>;
  const View view = lines_of(p.weight, p.base, p.cut, false);
  const PackAlong along = plan_pack<Word>(p.weight, p.base).along;
  const Index strips = smaller(rpsft::full_strips, p.weight.rows);
  const Range mine = split_range(strips, team.rank(), team.size());
  std::uint32_t words[full_run];
  for (Index strip = mine.begin; strip < mine.end; ++strip) {
    const Range rows = split_range(p.weight.rows, strip, strips);
    double square = 0;
    for (Index row = rows.begin; row < rows.end; ++row) {
      for (Index col = 0; col < p.weight.cols; col += full_run) {
        const Index run = smaller(full_run, p.weight.cols - col);
        along(view, row, 1, col, run, words, full_run);
        square += run_square<Lanes>(words, run);
      }
    }
    strip_squares[strip] = square;
  }
  team.wait();
  if (team.rank() == 0) {
    double total = 0;
    for (Index strip = 0; strip < strips; ++strip) total += strip_squares[strip];
    *p.square = static_cast<float>(total);
  }
  team.wait();
}

template <class Lanes, class G, bool accumulate>
void pull_back_full(const Pullback& p, rpsft::Team& team) {
  using Word = Float32Word<Lanes>;
  const Target target(p);
  const View view = lines_of(p.weight, p.base, p.cut, target.transposed);
  const PackAlong along = plan_pack<Word>(p.weight, p.base).along;
  const Range rows = split_range(target.grad.rows, team.rank(), team.size());
  std::uint32_t words[full_run];
  for (Index row = rows.begin; row < rows.end; ++row) {
    for (Index col = 0; col < target.grad.cols; col += full_run) {
      const Index run = smaller(full_run, target.grad.cols - col);
      along(view, row, 1, col, run, words, full_run);
      Index i = 0;
      if (target.grad.col_stride == 1 && target.holds(row, col) && target.holds(row, col + run - 1)) {
        G* at = static_cast<G*>(target.grad.data) + row * target.grad.row_stride + col;
        for (; i + Lanes::width <= run; i += Lanes::width) {
          auto value = Lanes::multiply(Word::load(words + i), Lanes::broadcast(p.scale));
          if constexpr (accumulate) value = Lanes::add(value, Lanes::load(at + i));
          Lanes::store(at + i, value);
        }
      }
      for (; i < run; ++i) put_element<G, accumulate>(target, row, col + i, p.scale * from_bits(words[i]));
    }
  }
}

template <class Lanes, class G>
void pull_back_full(const Pullback& p, bool accumulate, rpsft::Team& team) {
  if (accumulate) {
    pull_back_full<Lanes, G, true>(p, team);
  } else {
    pull_back_full<Lanes, G, false>(p, team);
  }
}

template <class Lanes>
void pull_back_full(const Pullback& p, bool accumulate, rpsft::Team& team) {
  switch (p.grad.dtype) {
    case rpsft::Dtype::bfloat16:
      return pull_back_full<Lanes, Bfloat16>(p, accumulate, team);
    case rpsft::Dtype::float16:
      return pull_back_full<Lanes, Float16>(p, accumulate, team);
    default:
      return pull_back_full<Lanes, float>(p, accumulate, team);
  }
}

}  // namespace
