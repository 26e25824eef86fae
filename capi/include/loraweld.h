/*
 * loraweld: merge LoRA adapters of diffusion models without training.
 *
 * Made by cbindgen from capi/src; do not edit. examples/c/merge.c shows it all at work.
 *
 * What holds for every function:
 *
 * - Calls that can fail return a LoraweldStatus; loraweld_last_error() tells more. No panic or exception crosses over.
 * - Results come through the last argument, which is NULL after a failure. Each is freed with the function of its type,
 *   once and not while a call uses it; handles do not depend on each other's lifetimes.
 * - Strings are UTF-8 and end with NUL. Those passed in are not kept. Those returned belong to the handle they come from,
 *   live as long as it, and are not freed.
 * - Any threads may use a handle at once. A calibration that is being added to makes its other users wait: do not add to
 *   one from the progress callback of a call that uses it.
 * - A pointer that must not be NULL is refused by name with LORAWELD_STATUS_INVALID. Any other must be valid: handles made
 *   by this library and not freed, arrays as long as their count says, none of them changed during the call.
 */

#ifndef LORAWELD_H
#define LORAWELD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/** In place of a task: the base model's inputs on unrelated prompts, where a merge should do nothing. */
#define LORAWELD_NEUTRAL SIZE_MAX

/**
 * How a call ended. `loraweld_last_error` tells more.
 */
typedef enum {
  /**
   * Done.
   */
  LORAWELD_STATUS_OK = 0,
  /**
   * An argument or option makes no sense, is not UTF-8, or is NULL where it must not be.
   */
  LORAWELD_STATUS_INVALID = 1,
  /**
   * The operating system refused a file operation: a file is missing, a disk is full.
   */
  LORAWELD_STATUS_IO = 2,
  /**
   * A file or one of its tensors is not what it should be, or an output exists and is not to be overwritten.
   */
  LORAWELD_STATUS_FILE = 3,
  /**
   * A layer cannot be computed.
   */
  LORAWELD_STATUS_LAYER = 4,
  /**
   * No device fits, or it failed.
   */
  LORAWELD_STATUS_DEVICE = 5,
  /**
   * The cancellation token was set.
   */
  LORAWELD_STATUS_CANCELLED = 6,
  /**
   * A bug of the library. The handles that were passed stay valid; please report it.
   */
  LORAWELD_STATUS_INTERNAL = 7,
} LoraweldStatus;

/**
 * A LoRA adapter.
 */
typedef struct LoraweldAdapter LoraweldAdapter;

/**
 * Statistics of what the layers of some adapters read.
 */
typedef struct LoraweldCalibration LoraweldCalibration;

/**
 * A cancellation token.
 */
typedef struct LoraweldCancel LoraweldCancel;

/**
 * Where merges are computed: a GPU or the CPU.
 */
typedef struct LoraweldDevice LoraweldDevice;

/**
 * What a merge gives: an adapter, and a report of what was done and lost.
 */
typedef struct LoraweldMerged LoraweldMerged;

/**
 * A layer of an adapter: `ΔW = scale · B · A`, A of rank x input, B of output x rank.
 */
typedef struct {
  /**
   * Its name, with dots where they are known. Owned by the adapter.
   */
  const char *name;
  /**
   * Columns of B, rows of A.
   */
  size_t rank;
  /**
   * The width that it reads.
   */
  size_t input;
  /**
   * The width that it writes.
   */
  size_t output;
  /**
   * The factor on B · A.
   */
  double scale;
} LoraweldLayer;

/**
 * How an adapter is written. All zero is the default.
 */
typedef struct {
  /**
   * `f32`, `f16` or `bf16`; NULL for the adapter's own.
   */
  const char *dtype;
  /**
   * Spelling of the keys: `peft`, `kohya`, `comfyui`, `bfl` or `xlabs`; NULL for the adapter's own.
   */
  const char *format;
  /**
   * Whether an existing file is replaced. What the adapter was made from never is.
   */
  bool overwrite;
} LoraweldSaveOptions;

/**
 * A matrix in host memory, row by row without gaps, in any alignment.
 */
typedef struct {
  /**
   * `f32`, `f16` or `bf16`.
   */
  const char *dtype;
  /**
   * Rows: tokens.
   */
  size_t rows;
  /**
   * Columns: the width that the layer reads.
   */
  size_t cols;
  /**
   * `rows * cols` elements of `dtype`.
   */
  const void *values;
} LoraweldMatrix;

/**
 * How far a long call is.
 */
typedef struct {
  /**
   * What is being done: `calibrate`, `survey`, `merge`, `truncate`, `measure`. Valid during the callback.
   */
  const char *stage;
  /**
   * The layer or the file that comes next; empty at the end of a stage. Valid during the callback.
   */
  const char *item;
  /**
   * Items that are done.
   */
  uint64_t done;
  /**
   * Items in all.
   */
  uint64_t total;
} LoraweldProgress;

/**
 * Called with `user` before each item and at the end of each stage, from the thread that made the call. It must not
 * throw or jump out.
 */
typedef void (*LoraweldProgressFn)(void *user, const LoraweldProgress *progress);

/**
 * Progress and cancellation of a long call. NULL in any place is for none.
 */
typedef struct {
  /**
   * Called as the work goes on.
   */
  LoraweldProgressFn progress;
  /**
   * What `progress` gets first.
   */
  void *user;
  /**
   * Ends the call with `LORAWELD_STATUS_CANCELLED` when it is set.
   */
  const LoraweldCancel *cancel;
} LoraweldControl;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The version of the library, such as `0.1.0`. Never freed.
 */
const char *loraweld_version(void);

/**
 * Opens a `.safetensors` file or a PEFT folder. Free `adapter` with `loraweld_adapter_free`; the file stays mapped until
 * then, and must not be changed.
 */
LoraweldStatus loraweld_adapter_open(const char *path,
                                     LoraweldAdapter **adapter);

/**
 * The name of the file without its extension, or of the folder. Owned by the adapter; NULL for NULL.
 */
const char *loraweld_adapter_name(const LoraweldAdapter *adapter);

/**
 * How many layers an adapter has; 0 for NULL.
 */
size_t loraweld_adapter_layer_count(const LoraweldAdapter *adapter);

/**
 * Writes what the layer at `index` is to `layer`.
 */
LoraweldStatus loraweld_adapter_layer(const LoraweldAdapter *adapter, size_t index, LoraweldLayer *layer);

/**
 * Writes a `.safetensors` file, whole or not at all. `options` may be NULL.
 */
LoraweldStatus loraweld_adapter_save(const LoraweldAdapter *adapter,
                                     const char *path,
                                     const LoraweldSaveOptions *options);

/**
 * Frees an adapter; NULL does nothing. What was made from it stays valid.
 */
void loraweld_adapter_free(LoraweldAdapter *adapter);

/**
 * Makes an empty calibration for a pool of adapters. It serves merges of any of them. Free `calibration` with
 * `loraweld_calibration_free`.
 */
LoraweldStatus loraweld_calibration_new(const LoraweldAdapter *const *adapters,
                                        size_t count,
                                        LoraweldCalibration **calibration);

/**
 * Adds one batch of what `layer`, in any spelling, read while the adapter at `task` of the pool was active; or, for
 * `LORAWELD_NEUTRAL`, of what it reads of the base model. Batches of any size, in any order; `inputs` is not kept.
 */
LoraweldStatus loraweld_calibration_accumulate(const LoraweldCalibration *calibration,
                                               const LoraweldDevice *device,
                                               size_t task,
                                               const char *layer,
                                               const LoraweldMatrix *inputs);

/**
 * Adds the tensors of a `.safetensors` file of recorded activations, or of all such files of a folder: each named as the
 * layer that read it, tokens x width. `task` as for `loraweld_calibration_accumulate`; `control` may be NULL. What came
 * before a failure has been added.
 */
LoraweldStatus loraweld_calibration_accumulate_file(const LoraweldCalibration *calibration,
                                                    const LoraweldDevice *device,
                                                    size_t task,
                                                    const char *path,
                                                    const LoraweldControl *control);

/**
 * Writes a calibration, whole or not at all; an existing file is replaced only if `overwrite` says so.
 */
LoraweldStatus loraweld_calibration_save(const LoraweldCalibration *calibration,
                                         const char *path,
                                         bool overwrite);

/**
 * Opens a calibration, for merges; nothing can be added to it. Free `calibration` with `loraweld_calibration_free`.
 */
LoraweldStatus loraweld_calibration_open(const char *path,
                                         LoraweldCalibration **calibration);

/**
 * Frees a calibration; NULL does nothing.
 */
void loraweld_calibration_free(LoraweldCalibration *calibration);

/**
 * Makes a cancellation token. Free it with `loraweld_cancel_free`, after the calls that it was given to.
 */
LoraweldStatus loraweld_cancel_new(LoraweldCancel **cancel);

/**
 * Sets the token: calls that have it return soon, and so does every later one. Any thread may do so, and a signal
 * handler. NULL does nothing.
 */
void loraweld_cancel_set(const LoraweldCancel *cancel);

/**
 * Clears the token, so that it can be used again. NULL does nothing.
 */
void loraweld_cancel_reset(const LoraweldCancel *cancel);

/**
 * Frees a token; NULL does nothing.
 */
void loraweld_cancel_free(LoraweldCancel *cancel);

/**
 * Opens a device.
 *
 * `select`: `auto` (a hardware GPU, else the CPU; NULL is the same), `cpu`, `gpu` (a software one if there is no other), a
 * number, or a part of the adapter's name. `precision`: `auto` (NULL is the same), `fast`, `f64` or `double-single`. `memory`:
 * bytes of device memory to stay within; 0 for 2 GiB. Free `device` with `loraweld_device_free`.
 */
LoraweldStatus loraweld_device_open(const char *select,
                                    const char *precision,
                                    uint64_t memory,
                                    LoraweldDevice **device);

/**
 * What the device is, and in which arithmetic it computes. Owned by the device; NULL for NULL.
 */
const char *loraweld_device_describe(const LoraweldDevice *device);

/**
 * Frees a device; NULL does nothing. What was made on it stays valid.
 */
void loraweld_device_free(LoraweldDevice *device);

/**
 * Merges adapters.
 *
 * `method` and its `options`, a JSON object, NULL or keys left out for the defaults:
 *
 * - `ssr`: `ridge` (`{"relative": 1e-3}` or `{"absolute": 1e-4}`), `prior` (`"adapters"`, `"sum"`, `"zero"`, `"average"`),
 *   `prior_weight`, `task_weights`, `balance`, `neutral_weight`, `absent` (`"count"`, `"skip"`), `coordinates`
 *   (`"orthonormal"`, `"files"`), `isotropic`, and `as_published`, which begins with the authors' ridge, prior, absent and
 *   coordinates. It takes a calibration; `ssr-data-free` goes without.
 * - `np-lora`, with the style first: `projection` (`{"soft": 0.5}` or `"hard"`), `by_layer` (`[["PATTERN", "hard"]]`),
 *   `directions` (`"all"`, `{"count": 8}`, `{"energy": 0.9}`)
 * - `linear`: none
 * - `svd`: `rank`, `spectrum` (`{"ratio": 100}`, `{"frobenius": 0.95}`, `{"cumulative": 0.95}`)
 * - `ties`: `density`, `lambda`, `rank`, `scope` (`"layer"`, `"file"`), `one_more`, `elect` (`"weighted"`, `"unweighted"`),
 *   `zero` (`"plus"`, `"majority"`), `alone` (`"keep"`, `"merge"`), and `as`, whose definition the others begin with
 *   (`"loraweld"`, `"paper"`, `"peft"`)
 * - `dare`: the same but for `scope` and `one_more`, and `seed`, `ties`
 * - `tsv`: `keep` (`"all"`, `"share"`); `iso-c`: `mean` (`"directions"`, `"width"`)
 * - `knots`, `core`: `rule` (`"ties"`, `"dare"`, `"sum"`, `"mean"`, `"tsv"`, `"iso"`; ties by default) and its options but
 *   for `rank`; `core` also `bases` (`"updates"`, `"factors"`)
 *
 * and for each, `truncate`, an object as the options of `svd`; `budget` (`{"ranks": 400}`, `{"bytes": 20000000}`,
 * `{"loss": 0.05}`) for all layers together; `truncate_by` (`"data"`, the default with a calibration, or `"norm"`); and
 * `calibrate_singular_values` (`true`). The report's `options` can be given back.
 *
 * `strengths`, one for each of the `count` adapters, are 1 if NULL. `calibration`, NULL or one of a pool that these
 * adapters are of, is what SSR solves for; the others' losses are measured by it. `control` may be NULL. Free `merged`
 * with `loraweld_merged_free`; nothing is written to disk but temporary files.
 */
LoraweldStatus loraweld_merge(const LoraweldDevice *device,
                              const char *method,
                              const char *options,
                              const LoraweldAdapter *const *adapters,
                              const double *strengths,
                              size_t count,
                              const LoraweldCalibration *calibration,
                              const LoraweldControl *control,
                              LoraweldMerged **merged);

/**
 * The merged adapter, as a handle of its own, which is freed with `loraweld_adapter_free`.
 */
LoraweldStatus loraweld_merged_adapter(const LoraweldMerged *merged, LoraweldAdapter **adapter);

/**
 * The report, as JSON. Owned by `merged`; NULL for NULL.
 */
const char *loraweld_merged_report(const LoraweldMerged *merged);

/**
 * Frees what a merge gave, but for adapters taken from it; NULL does nothing.
 */
void loraweld_merged_free(LoraweldMerged *merged);

/**
 * What went wrong in the last call of this thread that failed: one line that names the file, key or layer and says
 * what would be right. Empty if none has failed. Owned by the library; valid until another call of this thread fails.
 */
const char *loraweld_last_error(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* LORAWELD_H */
