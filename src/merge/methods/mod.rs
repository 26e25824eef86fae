//! The methods, one file each: its formula, its options, its arithmetic, and how it is [entered](entry) in [`METHODS`].

mod core;
mod dare;
mod entry;
mod fair;
mod iso_c;
mod knots;
mod linear;
mod np_lora;
mod of_entries;
mod rule;
mod ssr;
mod svd;
mod ties;
mod tsv;

pub use self::dare::Dare;
pub use self::entry::{
    Build, MethodEntry, MethodOption, Needs, Number, Only, OptionGroup, Options, Takes, Variant, method,
};
pub use self::iso_c::{Iso, IsoMean};
pub use self::linear::Linear;
pub use self::np_lora::{Directions, NpLora, NpLoraOptions, Projection};
pub use self::rule::Rule;
pub use self::ssr::{Absent, Coordinates, Prior, Ridge, Ssr, SsrOptions, TaskBalance};
pub use self::svd::SvdMerge;
pub use self::ties::Ties;
pub use self::tsv::{Keep, Tsv};

/// Every method. What offers methods by name goes through this table.
pub static METHODS: &[MethodEntry] = &[
    ssr::ENTRY,
    np_lora::ENTRY,
    linear::ENTRY,
    svd::ENTRY,
    ties::ENTRY,
    dare::ENTRY,
    knots::ENTRY,
    core::ENTRY,
    tsv::ENTRY,
    iso_c::ENTRY,
];
