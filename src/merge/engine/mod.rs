//! What every method does around its own arithmetic: [match, check, pass through, write](driver), [cut into
//! chunks](chunks), [measure the loss](measure), [truncate](truncate), in the [metric of the data](metric) and by one
//! [budget](budget).

pub(crate) mod budget;
pub(crate) mod chunks;
pub(crate) mod driver;
pub(crate) mod measure;
pub(crate) mod metric;
pub(crate) mod truncate;
