// Stream-K (Osama et al., arXiv 2301.03598), which balances split-K. A row of the work grid is an
// output tile (rows of W by tokens), and its work units are steps along K. All units form one
// sequence, row after row, which is cut into equal work ranges, one for each worker (a CTA or a
// cluster of CTAs). A work range may begin and end anywhere in a row.
//
//   rows           |----- row 0 -----|----- row 1 -----|----- row 2 -----|
//   work ranges    [--- 0 ---)[--- 1 ---)[--- 2 ---)[--- 3 ---)[-- 4 --)
//
// If one worker has a whole row, it can store the results itself. Other rows are shared: each of
// their workers stores fp32 partial sums in the workspace, and a second small kernel adds these in
// the order of K, so that results are repeatable bit for bit. A worker has partial sums of at most
// two rows: the row that began before its range (slot 0), and the row that begins in it and ends
// after it (slot 1).
#pragma once

#include <cstdint>

#include "base/host_device.h"
#include "plan/spmm_plan.h"

namespace flash_llm {

struct StreamK {
  int units;  // rows * units_per_row
  int units_per_row;
  int workers;  // at most `units`, so every worker has work
  // units / workers and units % workers: the first `extra_units` workers have one unit more.
  int units_per_worker, extra_units;

  StreamK() = default;
  FLASH_LLM_HOST_DEVICE StreamK(int rows, int cols, int workers)
      : units(rows * cols),
        units_per_row(cols),
        workers(workers),
        units_per_worker(units / workers),
        extra_units(units % workers) {}
  explicit StreamK(const WorkGrid& work)
      : StreamK(static_cast<int>(work.rows), static_cast<int>(work.cols),
                static_cast<int>(work.workers)) {}

  // Where the work range of `worker` begins, and that of the worker before it ends.
  FLASH_LLM_HOST_DEVICE int first_unit(int worker) const {
    return worker * units_per_worker + (worker < extra_units ? worker : extra_units);
  }

  // The worker whose range contains a unit.
  FLASH_LLM_HOST_DEVICE int worker_of(int unit) const {
    const int in_longer_ranges = extra_units * (units_per_worker + 1);
    return unit < in_longer_ranges ? unit / (units_per_worker + 1)
                                   : extra_units + (unit - in_longer_ranges) / units_per_worker;
  }

  // Whether any row is shared between workers.
  bool shares_rows() const { return extra_units != 0 || units_per_worker % units_per_row != 0; }
};

}  // namespace flash_llm
