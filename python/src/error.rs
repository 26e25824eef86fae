//! Errors as exceptions: a class of `loraweld._errors` for each kind, with the library's message.

use std::io;
use std::path::Path;

use loraweld::Error;
use loraweld::cli::{Failure, remedy};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::options::in_python;

/// What an exception is made of.
#[derive(Debug)]
pub struct Raised {
    class: &'static str,
    message: String,
    file: Option<String>,
    key: Option<String>,
    layer: Option<String>,
}

impl Raised {
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new("InvalidError", message.into())
    }

    pub fn new(class: &'static str, message: String) -> Self {
        Self { class, message, file: None, key: None, layer: None }
    }

    /// With the option that allows what was refused, if one does.
    fn with_remedy(self, error: &Error) -> Self {
        match remedy(error) {
            Some(remedy) => Self { message: format!("{}; {}", self.message, in_python(remedy)), ..self },
            None => self,
        }
    }
}

fn of_io(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "NotFoundError",
        io::ErrorKind::PermissionDenied => "NoPermissionError",
        _ => "IoError",
    }
}

impl From<&Error> for Raised {
    fn from(error: &Error) -> Self {
        let raised = Self::new("LoraweldError", error.to_string());
        let file = |path: &Path| Some(path.display().to_string());
        match error {
            Error::Io { path, source, .. } => Self { class: of_io(source), file: file(path), ..raised },
            Error::File { path, .. } => Self { class: "FileError", file: file(path), ..raised },
            Error::Exists { path } => Self { class: "ExistsError", file: file(path), ..raised },
            Error::NotMergeable { path, .. } => {
                Self { class: "NotMergeableError", file: file(path), ..raised }
            }
            Error::Tensor { path, key, .. } => {
                Self { class: "TensorError", file: file(path), key: Some(key.clone()), ..raised }
            }
            Error::Layer { layer, .. } => Self { class: "LayerError", layer: Some(layer.clone()), ..raised },
            Error::Unnamed { layer, .. } => {
                Self { class: "UnnamedError", layer: Some(layer.clone()), ..raised }
            }
            Error::Invalid(_) => Self { class: "InvalidError", ..raised },
            Error::Device(_) => Self { class: "DeviceError", ..raised },
            Error::Cancelled => Self { class: "CancelledError", ..raised },
            _ => raised,
        }
    }
}

impl From<Error> for Raised {
    fn from(error: Error) -> Self {
        Self::from(&error).with_remedy(&error)
    }
}

impl From<Failure> for Raised {
    fn from(failure: Failure) -> Self {
        if failure.usage {
            return Self::invalid(in_python(&failure.message));
        }
        let error = failure.cause::<Error>();
        let raised = match (error, failure.cause::<io::Error>()) {
            (Some(error), _) => Self::from(error),
            (None, Some(error)) => Self::new(of_io(error), String::new()),
            (None, None) => Self::new("LoraweldError", String::new()),
        };
        let raised = Self { message: failure.message.clone(), ..raised };
        error.into_iter().fold(raised, Self::with_remedy)
    }
}

impl From<Raised> for PyErr {
    fn from(raised: Raised) -> Self {
        let Raised { class, message, file, key, layer } = raised;
        Python::attach(|py| {
            let made = py.import("loraweld._errors").and_then(|module| {
                let fields = PyDict::new(py);
                fields.set_item("file", file)?;
                fields.set_item("key", key)?;
                fields.set_item("layer", layer)?;
                module.getattr("_made")?.call1((class, message.as_str(), fields))
            });
            match made {
                Ok(error) => PyErr::from_value(error),
                Err(error) => {
                    let told = PyRuntimeError::new_err(message);
                    told.set_cause(py, Some(error));
                    told
                }
            }
        })
    }
}

/// A library's error as an exception.
pub fn raised(error: Error) -> PyErr {
    Raised::from(error).into()
}
