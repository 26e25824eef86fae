//! Reports that people look at: one HTML file that loads nothing. [`html`] is the page, [`merge`], [`compare`],
//! [`inspect`] and [`calibration`] fill it.

mod calibration;
mod compare;
mod html;
mod inspect;
mod maps;
mod merge;
mod spectra;

pub use calibration::Recorded;
pub use compare::{Comparison, Entry};
pub use inspect::Inspected;
pub use merge::{Made, Norms};

use std::path::Path;

/// Whether a report of this name is a page: it ends in `.html` or `.htm`.
pub fn is_page(path: &Path) -> bool {
    let end = path.extension().and_then(|end| end.to_str());
    end.is_some_and(|end| ["html", "htm"].iter().any(|page| end.eq_ignore_ascii_case(page)))
}
