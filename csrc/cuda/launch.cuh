// launch.cuh: from a plan to launches, for one element type. Included once per type (launch_*.cu), so that the types
// compile side by side; entry.cu chooses among them.
#pragma once

#include <type_traits>

#include "fused.cuh"
#include "reduce.cuh"

namespace normkern::cuda {

// Returns the error of a launch, if any, from the function around it.
#define NK_CHECK_CUDA(call)       \
  do {                            \
    const int error = (call);     \
    if (error != 0) return error; \
  } while (false)

inline LaunchConfig config_of(const Launch& launch) {
  LaunchConfig config;
  config.grid = dim3(unsigned(launch.blocks));
  config.block = dim3(unsigned(launch.threads));
  config.shared = size_t(launch.shared);
  return config;
}

// The launches of one call. Every member function launches on the stream and returns the first error.
template <class T, int V>
class Launcher {
  using A = Compute<T>;

 public:
  Launcher(const Problem& p, const Plan& plan, Pass pass, void* workspace, Stream stream)
      : p_(p),
        plan_(plan),
        layout_(workspace_of(p, plan, pass)),
        workspace_(static_cast<char*>(workspace)),
        stream_(stream) {}

  int forward(const ForwardArgs& a) const {
    const Affine<T> affine = affine_of(a.weight, a.bias, a.residual);
    switch (plan_.strategy) {
      case Strategy::warp:
      case Strategy::block: return fused_moments(a.x, a.y, affine, a.mean_out, a.var_out);
      default: break;
    }
    if (p_.moments == Moments::given)
      NK_CHECK_CUDA(prepare_arrays(a.mean, a.var));
    else
      NK_CHECK_CUDA(reduce_moments(a.x, a.mean_out, a.var_out, moment_arrays()));
    const MapForward<T> map{static_cast<const T*>(a.x), static_cast<T*>(a.y), p_.stats.numel(),
                            Indexer(p_.stats),          moment_arrays(),      affine};
    return launch(config_of(plan_.map), stream_, map_forward<T, V>, map);
  }

  int moments(const MomentsArgs& a) const {
    switch (plan_.strategy) {
      case Strategy::warp:
      case Strategy::block: return fused_moments(a.x, nullptr, Affine<T>{}, a.mean_out, a.var_out);
      default: return reduce_moments(a.x, a.mean_out, a.var_out, {});
    }
  }

  int backward(const BackwardArgs& a) const {
    const bool elements = a.dx || a.dresidual, params = a.dweight.data || a.dbias.data;
    const bool split = plan_.strategy == Strategy::split;
    const bool shared = sums_shared(p_);
    if (split || (params && !shared)) NK_CHECK_CUDA(prepare_arrays(a.mean, a.var));
    if (!split && (elements || (params && shared))) NK_CHECK_CUDA(fused_gradients(a));
    if (split && p_.moments != Moments::given && (a.dx || (params && shared))) {
      GradientsOf<T, V> op = gradients_of(a);
      op.walks_stats = true;
      op.walks_affine = shared;
      op.averages = average_arrays();
      if (shared) {
        op.dweight = a.dweight;
        op.dbias = a.dbias;
      }
      NK_CHECK_CUDA(reduce(plan_.reduce, p_.stats, op, layout_.reduce));
    }
    if (split && elements) NK_CHECK_CUDA(map_gradients(a));
    if (params && !shared) {
      GradientsOf<T, V> op = gradients_of(a);
      op.walks_affine = true;
      op.dweight = a.dweight;
      op.dbias = a.dbias;
      NK_CHECK_CUDA(reduce(plan_.affine, p_.affine, op, layout_.affine));
    }
    return 0;
  }

 private:
  Affine<T> affine_of(const Param& weight, const Param& bias, const void* residual) const {
    return {weight, bias, static_cast<const T*>(residual), p_.act, Indexer(p_.affine)};
  }

  A* array(int index) const { return reinterpret_cast<A*>(workspace_ + layout_.arrays + index * layout_.array_bytes); }
  MomentArrays<A> moment_arrays() const {
    if (p_.moments == Moments::second) return {nullptr, nullptr, array(2)};
    return {array(0), array(1), array(2)};
  }
  AverageArrays<A> average_arrays() const {
    if (p_.moments == Moments::given) return {};
    return {p_.moments == Moments::second ? nullptr : array(kMomentArrays), array(kMomentArrays + 1)};
  }

  int fused_moments(const void* x, void* y, const Affine<T>& affine, double* mean_out, double* var_out) const {
    const Domain d = simplify(p_.stats);
    const FusedForward<T, V> f{
        static_cast<const T*>(x),      static_cast<T*>(y), Runs<V>(d), affine,     double(d.count()), p_.eps,
        p_.moments == Moments::second, mean_out,           var_out,    plan_.lanes};
    return launch(config_of(plan_.fused), stream_, fused_forward<T, V>, f);
  }

  int fused_gradients(const BackwardArgs& a) const {
    const Domain d = simplify(p_.stats);
    const FusedBackward<T, V> f{static_cast<const T*>(a.dy),
                                static_cast<const T*>(a.x),
                                static_cast<T*>(a.dx),
                                static_cast<T*>(a.dresidual),
                                Runs<V>(d),
                                affine_of(a.weight, a.bias, a.residual),
                                a.mean,
                                a.var,
                                double(d.count()),
                                p_.eps,
                                p_.moments == Moments::second,
                                sums_shared(p_),
                                a.dweight,
                                a.dbias,
                                plan_.lanes};
    return launch(config_of(plan_.fused), stream_, fused_backward<T, V>, f);
  }

  int map_gradients(const BackwardArgs& a) const {
    const bool needs_x = p_.moments != Moments::given || p_.act != Act::none;
    const MapBackward<T> m{static_cast<const T*>(a.dy),
                           needs_x ? static_cast<const T*>(a.x) : nullptr,
                           static_cast<T*>(a.dx),
                           static_cast<T*>(a.dresidual),
                           p_.stats.numel(),
                           Indexer(p_.stats),
                           moment_arrays(),
                           average_arrays(),
                           affine_of(a.weight, a.bias, a.residual)};
    return launch(config_of(plan_.map), stream_, map_backward<T, V>, m);
  }

  // Also zeroes the tickets of the reductions to come: they lie first in their parts of the workspace.
  int prepare_arrays(const Param& mean, const Param& var) const {
    const Prepare<A> prepared{p_.moments == Moments::second ? Param{} : mean,
                              var,
                              p_.stats.groups(),
                              p_.eps,
                              moment_arrays(),
                              {tickets_at(layout_.reduce), tickets_at(layout_.affine)},
                              {ticket_count(p_.stats, plan_.reduce), ticket_count(p_.affine, plan_.affine)}};
    int64_t most = prepared.groups;
    for (const int64_t count : prepared.counts) most = count > most ? count : most;
    Launch shape;
    shape.threads = kMapThreads;
    shape.blocks = clamp(ceil_div(most, kMapThreads), 1, 1024);
    return launch(config_of(shape), stream_, prepare<A>, prepared);
  }

  unsigned* tickets_at(int64_t offset) const { return reinterpret_cast<unsigned*>(workspace_ + offset); }
  int64_t ticket_count(const Domain& d, const Reduce& r) const { return tickets_of(reduced(d, p_.dtype), r, V); }

  int reduce_moments(const void* x, double* mean_out, double* var_out, const MomentArrays<A>& arrays) const {
    const int64_t tickets = ticket_count(p_.stats, plan_.reduce);
    if (tickets > 0) NK_CHECK_CUDA(zero_async(tickets_at(layout_.reduce), size_t(tickets) * sizeof(unsigned), stream_));
    const MomentsOf<T, V> op{
        static_cast<const T*>(x), p_.moments == Moments::second, p_.eps, mean_out, var_out, arrays};
    return reduce(plan_.reduce, p_.stats, op, layout_.reduce);
  }

  GradientsOf<T, V> gradients_of(const BackwardArgs& a) const {
    GradientsOf<T, V> op{};
    op.dy = static_cast<const T*>(a.dy);
    op.x = static_cast<const T*>(a.x);
    op.stats = Indexer(p_.stats);
    op.moments = moment_arrays();
    op.affine = affine_of(a.weight, a.bias, a.residual);
    op.count = p_.stats.count();
    return op;
  }

  template <class Op>
  int reduce(const Reduce& r, const Domain& domain, const Op& op, int64_t offset) const {
    using Result = typename Op::Result;
    const Domain d = reduced(domain, p_.dtype);
    Meeting<Result> meeting;
    if (r.parts > 1) {
      meeting.tickets = tickets_at(offset);
      meeting.partials = reinterpret_cast<Result*>(workspace_ + offset + ticket_bytes(tickets_of(d, r, V)));
      meeting.parts = r.parts;
    }
    if (r.walk == Walk::rows)
      return launch(config_of(r.launch), stream_, reduce_rows<T, V, Op>, Runs<V>(d), op, meeting);
    return launch(config_of(r.launch), stream_, reduce_columns<T, V, Op>, d, tile_of(d, V), op, meeting);
  }

  const Problem& p_;
  const Plan& plan_;
  const Workspace layout_;
  char* const workspace_;
  const Stream stream_;
};

// One width for all accesses of a call: 16 bytes, or one element where a buffer is not aligned.
template <class T, class Run>
int with_width(const Plan& plan, Run run) {
  constexpr int kFull = int(kAccessBytes / sizeof(T));
  if (plan.vec == kFull) return run(std::integral_constant<int, kFull>());
  return run(std::integral_constant<int, 1>());
}

template <class T>
int forward_of(const Problem& p, const Plan& plan, const ForwardArgs& a, void* workspace, void* stream) {
  return with_width<T>(plan, [&](auto width) {
    return Launcher<T, width.value>(p, plan, Pass::forward, workspace, Stream(stream)).forward(a);
  });
}

template <class T>
int backward_of(const Problem& p, const Plan& plan, const BackwardArgs& a, void* workspace, void* stream) {
  return with_width<T>(plan, [&](auto width) {
    return Launcher<T, width.value>(p, plan, Pass::backward, workspace, Stream(stream)).backward(a);
  });
}

template <class T>
int moments_of(const Problem& p, const Plan& plan, const MomentsArgs& a, void* workspace, void* stream) {
  return with_width<T>(plan, [&](auto width) {
    return Launcher<T, width.value>(p, plan, Pass::moments, workspace, Stream(stream)).moments(a);
  });
}

#undef NK_CHECK_CUDA

}  // namespace normkern::cuda

// In launch_*.cu: the three programs of one type.
#define NK_INSTANTIATE(T)                                                                      \
  namespace normkern::cuda {                                                                   \
  template int forward_of<T>(const Problem&, const Plan&, const ForwardArgs&, void*, void*);   \
  template int backward_of<T>(const Problem&, const Plan&, const BackwardArgs&, void*, void*); \
  template int moments_of<T>(const Problem&, const Plan&, const MomentsArgs&, void*, void*);   \
  }
