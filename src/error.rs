//! The one error type of the crate.
//!
//! Every message says what was wrong, where (file, key, layer), and what would be right.

use std::path::{Path, PathBuf};

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a file operation.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, as a verb phrase: `open`, `write the merged adapter`.
        action: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A file is not what it should be as a whole.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// A tensor of a file cannot be used.
    #[error("{}: `{key}`: {reason}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's key, as it stands in the file.
        key: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// A layer cannot be computed.
    #[error("layer `{layer}`: {reason}")]
    Layer {
        /// The layer's name.
        layer: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// An option or argument makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// No device fits, or it failed.
    #[error("device: {0}")]
    Device(String),
    /// The caller's cancellation token was set.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    pub(crate) fn io(path: &Path, action: &'static str, source: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), action, source }
    }
    pub(crate) fn file(path: &Path, reason: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), reason: reason.into() }
    }
    pub(crate) fn tensor(path: &Path, key: &str, reason: impl Into<String>) -> Self {
        Self::Tensor { path: path.to_owned(), key: key.to_owned(), reason: reason.into() }
    }
    pub(crate) fn layer(layer: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Layer { layer: layer.into(), reason: reason.into() }
    }
}
