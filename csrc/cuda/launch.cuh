// launch.cuh: from a plan to launches, for one element type. Included once per type (launch_*.cu), so that the types
// compile side by side; entry.cu chooses among them.
#pragma once

#include <type_traits>

#include "fused_backward.cuh"
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
    if (a.mask_out && !can_mask(p_, plan_)) return 1;  // cudaErrorInvalidValue: its bytes would be shared
    const Affine<T> affine = affine_of(a);
    if (fused()) return fused_moments(a, affine);
    if (p_.moments == Moments::given)
      NK_CHECK_CUDA(prepare_arrays(a.mean, a.var));
    else
      NK_CHECK_CUDA(reduce_moments(a, moment_arrays()));
    const void* const x = a.add ? a.total : a.x;
    const MapForward<T> map{static_cast<const T*>(x), static_cast<T*>(a.y), p_.stats.numel(),
                            Indexer(p_.stats),        moment_arrays(),      affine};
    return launch(config_of(plan_.map), stream_, map_forward<T, V>, map);
  }

  int moments(const MomentsArgs& a) const {
    ForwardArgs f;
    f.x = a.x;
    f.mean_out = a.mean_out;
    f.var_out = a.var_out;
    return fused() ? fused_moments(f, Affine<T>{}) : reduce_moments(f, {});
  }

  // Whether the chip can hold what the plan launches together, by its own account.
  int resident(Pass pass, bool& yes) const {
    yes = true;
    const bool large_cluster = plan_.strategy == Strategy::cluster && plan_.team.blocks > kPortableCluster;
    if (plan_.strategy != Strategy::subgrid && !large_cluster) return 0;
    if (pass != Pass::backward)
      return can_be_resident(fused_config(), by_columns() ? fused_forward<T, V, true> : fused_forward<T, V, false>,
                             yes);
    return can_be_resident(fused_config(), by_columns() ? fused_backward<T, V, true> : fused_backward<T, V, false>,
                           yes);
  }

  int backward(const BackwardArgs& a) const {
    const bool elements = a.dx || a.dresidual, params = a.dweight.data || a.dbias.data;
    const bool split = !fused();
    const bool shared = split ? sums_shared(p_) : plan_.team.weight_sums;
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
  Affine<T> affine_of(const ForwardArgs& a) const {
    return {a.weight, a.bias, static_cast<const T*>(a.residual), p_.act, Indexer(p_.affine), nullptr, a.mask_out};
  }
  Affine<T> affine_of(const BackwardArgs& a) const {
    return {a.weight, a.bias, static_cast<const T*>(a.residual), p_.act, Indexer(p_.affine), a.mask, nullptr};
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

  bool fused() const { return plan_.strategy != Strategy::split; }
  bool by_columns() const { return plan_.team.walk == Walk::columns; }

  Teams teams_of(int streams) const {
    const Domain d = simplify(p_.stats);
    const Team& team = plan_.team;
    const Units units = units_of(p_, team.walk, team.weights, team.columns);
    const int64_t per_batch = by_columns() ? units.span / d.cols : units.beside;
    return {units,
            team,
            fused_memory(units, team, p_.dtype, V, streams, plan_.fused.threads),
            int(team.block_lines(units)),
            int(team.block_columns(units, V)),
            int(team.depth(units, V)),
            int(per_batch),
            FastDiv(by_columns() ? d.cols : 1),
            d.count(),
            streams,
            reinterpret_cast<Sums*>(workspace_ + layout_.boxes),
            tickets_at(0) + weight_rows(units, team).tickets};
  }

  LaunchConfig fused_config() const {
    LaunchConfig config = config_of(plan_.fused);
    if (plan_.strategy == Strategy::cluster) config.cluster = dim3(unsigned(plan_.team.blocks));
    config.cooperative = plan_.strategy == Strategy::subgrid;
    return config;
  }

  template <class Fused>
  int launch_fused(void (*rows)(Fused), void (*columns)(Fused), const Fused& f) const {
    if (layout_.boxes > 0) NK_CHECK_CUDA(zero_async(tickets_at(0), size_t(layout_.boxes), stream_));
    return launch(fused_config(), stream_, by_columns() ? columns : rows, f);
  }

  int fused_moments(const ForwardArgs& a, const Affine<T>& affine) const {
    const FusedForward<T, V> f{static_cast<const T*>(a.x),
                               static_cast<const T*>(a.add),
                               static_cast<T*>(a.y),
                               static_cast<T*>(a.total),
                               teams_of(1),
                               affine,
                               p_.eps,
                               p_.moments == Moments::second,
                               {a.mean_out, a.var_out, a.running}};
    return launch_fused(fused_forward<T, V, false>, fused_forward<T, V, true>, f);
  }

  int fused_gradients(const BackwardArgs& a) const {
    const Teams teams = teams_of(2);
    const WeightSums<A> weights{weight_rows(teams.units, teams.team),
                                reinterpret_cast<A*>(workspace_ + layout_.rows),
                                tickets_at(0),
                                p_.affine.groups(),
                                a.dweight,
                                a.dbias};
    const FusedBackward<T, V> f{static_cast<const T*>(a.dy),
                                static_cast<const T*>(a.x),
                                static_cast<const T*>(a.dtotal),
                                static_cast<T*>(a.dx),
                                static_cast<T*>(a.dresidual),
                                teams,
                                affine_of(a),
                                a.mean,
                                a.var,
                                p_.eps,
                                p_.moments == Moments::second,
                                weights};
    return launch_fused(fused_backward<T, V, false>, fused_backward<T, V, true>, f);
  }

  int map_gradients(const BackwardArgs& a) const {
    const bool needs_x = p_.moments != Moments::given || (p_.act != Act::none && !a.mask);
    const MapBackward<T> m{static_cast<const T*>(a.dy),
                           needs_x ? static_cast<const T*>(a.x) : nullptr,
                           static_cast<const T*>(a.dtotal),
                           static_cast<T*>(a.dx),
                           static_cast<T*>(a.dresidual),
                           p_.stats.numel(),
                           Indexer(p_.stats),
                           moment_arrays(),
                           average_arrays(),
                           affine_of(a)};
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

  int reduce_moments(const ForwardArgs& a, const MomentArrays<A>& arrays) const {
    const int64_t tickets = ticket_count(p_.stats, plan_.reduce);
    if (tickets > 0) NK_CHECK_CUDA(zero_async(tickets_at(layout_.reduce), size_t(tickets) * sizeof(unsigned), stream_));
    const MomentsOf<T, V> op{static_cast<const T*>(a.x),
                             static_cast<const T*>(a.add),
                             static_cast<T*>(a.total),
                             p_.moments == Moments::second,
                             p_.eps,
                             {a.mean_out, a.var_out, a.running},
                             arrays};
    return reduce(plan_.reduce, p_.stats, op, layout_.reduce);
  }

  GradientsOf<T, V> gradients_of(const BackwardArgs& a) const {
    GradientsOf<T, V> op{};
    op.dy = static_cast<const T*>(a.dy);
    op.x = static_cast<const T*>(a.x);
    op.stats = Indexer(p_.stats);
    op.moments = moment_arrays();
    op.affine = affine_of(a);
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

template <class T>
int resident_of(const Problem& p, const Plan& plan, Pass pass, bool& yes) {
  return with_width<T>(
      plan, [&](auto width) { return Launcher<T, width.value>(p, plan, pass, nullptr, Stream()).resident(pass, yes); });
}

#undef NK_CHECK_CUDA

}  // namespace normkern::cuda

// In launch_*.cu: the three programs of one type.
#define NK_INSTANTIATE(T)                                                                      \
  namespace normkern::cuda {                                                                   \
  template int forward_of<T>(const Problem&, const Plan&, const ForwardArgs&, void*, void*);   \
  template int backward_of<T>(const Problem&, const Plan&, const BackwardArgs&, void*, void*); \
  template int moments_of<T>(const Problem&, const Plan&, const MomentsArgs&, void*, void*);   \
  template int resident_of<T>(const Problem&, const Plan&, Pass, bool&);                       \
  }
