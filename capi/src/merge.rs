//! Merging.

use std::ffi::{CString, c_char};
use std::path::PathBuf;

use loraweld::{Adapter, Merged, Weighted};

use crate::adapter::LoraweldAdapter;
use crate::calibration::LoraweldCalibration;
use crate::control::{LoraweldControl, controlled};
use crate::device::LoraweldDevice;
use crate::ffi::{self, Out};
use crate::method::Method;
use crate::status::{Failure, LoraweldStatus, guard};

/// What a merge gives: an adapter, and a report of what was done and lost.
pub struct LoraweldMerged {
    adapter: Adapter,
    report: CString,
    /// The inputs' files.
    files: Vec<PathBuf>,
}

/// Merges adapters.
///
/// `method` and its `options`, a JSON object, NULL or keys left out for the defaults:
///
/// - `ssr`: `ridge` (`{"relative": 1e-3}` or `{"absolute": 1e-4}`), `prior` (`"adapters"`, `"sum"`, `"zero"`, `"average"`),
///   `prior_weight`, `task_weights`, `balance`, `neutral_weight`, `absent` (`"count"`, `"skip"`), `coordinates`
///   (`"orthonormal"`, `"files"`), `isotropic`, and `as_published`, which begins with the authors' ridge, prior, absent and
///   coordinates. It takes a calibration; `ssr-data-free` goes without.
/// - `np-lora`, with the style first: `projection` (`{"soft": 0.5}` or `"hard"`), `by_layer` (`[["PATTERN", "hard"]]`),
///   `directions` (`"all"`, `{"count": 8}`, `{"energy": 0.9}`)
/// - `linear`: none
/// - `svd`: `rank`, `spectrum` (`{"ratio": 100}`, `{"frobenius": 0.95}`, `{"cumulative": 0.95}`)
/// - `ties`: `density`, `lambda`, `rank`, `scope` (`"layer"`, `"file"`), `one_more`, `elect` (`"weighted"`, `"unweighted"`),
///   `zero` (`"plus"`, `"majority"`), `alone` (`"keep"`, `"merge"`), and `as`, whose definition the others begin with
///   (`"loraweld"`, `"paper"`, `"peft"`)
/// - `dare`: the same but for `scope` and `one_more`, and `seed`, `ties`
/// - `tsv`: `keep` (`"all"`, `"share"`); `iso-c`: `mean` (`"directions"`, `"width"`)
/// - `knots`, `core`: `rule` (`"ties"`, `"dare"`, `"sum"`, `"mean"`, `"tsv"`, `"iso"`; ties by default) and its options but
///   for `rank`; `core` also `bases` (`"updates"`, `"factors"`)
///
/// and for each, `truncate`, an object as the options of `svd`; `budget` (`{"ranks": 400}`, `{"bytes": 20000000}`,
/// `{"loss": 0.05}`) for all layers together; `truncate_by` (`"data"`, the default with a calibration, or `"norm"`); and
/// `calibrate_singular_values` (`true`). The report's `options` can be given back.
///
/// `strengths`, one for each of the `count` adapters, are 1 if NULL. `calibration`, NULL or one of a pool that these
/// adapters are of, is what SSR solves for; the others' losses are measured by it. `control` may be NULL. Free `merged`
/// with `loraweld_merged_free`; nothing is written to disk but temporary files.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_merge(
    device: *const LoraweldDevice,
    method: *const c_char,
    options: *const c_char,
    adapters: *const *const LoraweldAdapter,
    strengths: *const f64,
    count: usize,
    calibration: *const LoraweldCalibration,
    control: *const LoraweldControl,
    merged: *mut *mut LoraweldMerged,
) -> LoraweldStatus {
    guard(|| {
        // SAFETY: the caller keeps what the header asks for.
        let (out, device, method, options, adapters, calibration) = unsafe {
            (
                Out::new(merged, "merged")?,
                &ffi::get(device, "device")?.device,
                ffi::text(method, "method")?,
                ffi::optional_text(options, "options")?,
                LoraweldAdapter::all(adapters, count)?,
                calibration.as_ref().map(LoraweldCalibration::read).transpose()?,
            )
        };
        let ones = vec![1.0; count];
        let strengths = match strengths.is_null() {
            true => &ones,
            // SAFETY: as above.
            false => unsafe { ffi::slice(strengths, count, "strengths") }?,
        };
        if adapters.is_empty() {
            return Err(Failure::invalid("`count` is 0; a merge takes at least one adapter"));
        }
        let method = Method::parse(method, options, calibration.as_deref())?;
        let weighted: Vec<Weighted<'_>> =
            adapters.iter().zip(strengths).map(|(handle, &strength)| handle.adapter.at(strength)).collect();
        // SAFETY: as above.
        let Merged { adapter, report } =
            unsafe { controlled(control, |control| method.merge(device, &weighted, control)) }?;
        let json = serde_json::to_string(&report)
            .map_err(|e| Failure::internal(format!("the report cannot be written as JSON: {e}")))?;
        let files = report.inputs.into_iter().map(|input| input.path).collect();
        out.put(LoraweldMerged { adapter, report: ffi::c_string(&json), files });
        Ok(())
    })
}

/// The merged adapter, as a handle of its own, which is freed with `loraweld_adapter_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_merged_adapter(
    merged: *const LoraweldMerged,
    adapter: *mut *mut LoraweldAdapter,
) -> LoraweldStatus {
    guard(|| {
        // SAFETY: the caller keeps what the header asks for.
        let (out, merged) = unsafe { (Out::new(adapter, "adapter")?, ffi::get(merged, "merged")?) };
        out.put(LoraweldAdapter::new(merged.adapter.clone(), merged.files.clone()));
        Ok(())
    })
}

/// The report, as JSON. Owned by `merged`; NULL for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_merged_report(merged: *const LoraweldMerged) -> *const c_char {
    // SAFETY: the caller keeps what the header asks for.
    unsafe { ffi::field(merged, |merged| &merged.report) }
}

/// Frees what a merge gave, but for adapters taken from it; NULL does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_merged_free(merged: *mut LoraweldMerged) {
    // SAFETY: the caller keeps what the header asks for.
    unsafe { ffi::free(merged) }
}
