//! loraweld for Python: what `python/loraweld/*.py` makes its functions of.
//!
//! Commands run as the command line runs them ([`run`]), on adapters and calibrations that may be in memory ([`adapter`],
//! [`calibration`]), and their methods and options come from its own description ([`options`]).

mod adapter;
mod array;
mod calibration;
mod error;
mod options;
mod run;

use std::ffi::OsString;

use pyo3::prelude::*;

/// Runs the command line in this process, and gives its exit code.
#[pyfunction]
fn main(py: Python<'_>, args: Vec<OsString>) -> u8 {
    py.detach(|| loraweld::cli::main_with(args))
}

#[pymodule]
fn _loraweld(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<adapter::Adapter>()?;
    module.add_class::<adapter::Layer>()?;
    module.add_class::<calibration::Calibration>()?;
    module.add_function(wrap_pyfunction!(adapter::open, module)?)?;
    module.add_function(wrap_pyfunction!(main, module)?)?;
    module.add_function(wrap_pyfunction!(options::arguments, module)?)?;
    module.add_function(wrap_pyfunction!(options::methods, module)?)?;
    module.add_function(wrap_pyfunction!(run::run, module)?)?;
    module.add_function(wrap_pyfunction!(run::shut_down, module)?)?;
    Ok(())
}
