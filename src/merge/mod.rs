//! Merging: the plan (which layers, which adapters), one file a method, the loss, the report.
//!
//! A method takes adapters at strengths ([`Adapter::at`](crate::Adapter::at)) and gives a [`Merged`]: an ordinary LoRA and
//! a [`Report`] on what each layer lost. [`METHODS`] lists all of them; [`method`] makes one by its name.
//!
//! | | |
//! |---|---|
//! | `plan`, `report` | what goes in and what came out |
//! | `methods` | a file a method, and the table of them |
//! | `cores`, `entries` | what methods have in common that merge small cores, or entries of updates |
//! | `engine` | what every method does around its own arithmetic |
//! | `after`, `spread` | what may be done with any merge afterwards |
//! | `strengths`, `overlap` | what may be asked before one |
//! | `verify` | what is computed a second time after one |
//! | `factored`, `frame`, `members`, `algebra` | what all of these are written in |
//!
//! Each uses what stands below it, and nothing above.

mod after;
mod algebra;
mod cores;
mod engine;
mod entries;
mod factored;
mod frame;
mod members;
mod methods;
mod overlap;
mod plan;
mod report;
mod spread;
mod strengths;
mod verify;

pub use after::{After, TruncateBy};
pub use cores::{Bases, CoreMerge};
pub use engine::budget::Budget;
pub use engine::driver::{Destination, Method, Run};
pub use engine::truncate::{Spectrum, Truncating, Truncation};
pub use entries::{Alone, Elect, EntryMerge, Scope, ZeroSum};
pub use methods::{
    Absent, Build, Coordinates, Dare, Directions, Iso, IsoMean, Keep, Linear, METHODS, MethodEntry,
    MethodOption, Needs, NpLora, NpLoraOptions, Number, Only, OptionGroup, Options, Prior, Projection, Ridge,
    Rule, Ssr, SsrOptions, SvdMerge, Takes, TaskBalance, Ties, Tsv, Variant, method,
};
pub use overlap::{LayerOverlap, Overlap, Overlaps, overlaps};
pub use plan::{Plan, PlannedLayer};
pub use report::{
    Action, DeviceMemory, InputReport, LayerReport, Losses, Merged, ProjectionReport, Report, Routing,
    SingularValues, TaskLosses,
};
pub use strengths::{BlockStrengths, Strengths, strengths};
pub use verify::{VERIFIED, Verified, verify};
