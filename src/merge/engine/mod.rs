//! What every method does around its own arithmetic: [match, check, pass through, write](driver), [cut into
//! chunks](chunks), [measure the loss](measure), [truncate](truncate).

pub(crate) mod chunks;
pub(crate) mod driver;
pub(crate) mod measure;
pub(crate) mod truncate;
