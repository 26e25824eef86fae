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
    /// An output exists, and is not to be overwritten.
    #[error("{}: exists already; ask for overwriting or choose another name", path.display())]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// A file holds what is no plain LoRA, and was not opened so that it can be read as one or left out.
    #[error("{}: {what}", path.display())]
    NotMergeable {
        /// The file.
        path: PathBuf,
        /// Which tensors, what they are, and what is missing.
        what: String,
        /// What it can be opened with.
        remedy: Remedy,
    },
    /// Layers have no known name in the spelling that was asked for ([`SaveOptions::unnamed`](crate::SaveOptions::unnamed)).
    #[error("layer `{layer}`: {reason}")]
    Unnamed {
        /// The first of them.
        layer: String,
        /// Why it has none, and which others are without.
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

/// With which of its [`OpenOptions`](crate::OpenOptions) a file can be opened that is [not
/// mergeable](Error::NotMergeable) without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Remedy {
    /// [`skip_unsupported`](crate::OpenOptions::skip_unsupported): leave out what cannot be merged.
    Skip,
    /// [`truncate`](crate::OpenOptions::truncate): a rank to cut to.
    Rank,
    /// [`base`](crate::OpenOptions::base): the base model's weights, and a rank to cut to.
    Base,
}

impl Error {
    pub(crate) fn io(path: &Path, action: &'static str, source: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), action, source }
    }
    pub(crate) fn file(path: &Path, reason: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), reason: reason.into() }
    }
    pub(crate) fn not_mergeable(path: &Path, what: impl Into<String>, remedy: Remedy) -> Self {
        Self::NotMergeable { path: path.to_owned(), what: what.into(), remedy }
    }
    pub(crate) fn tensor(path: &Path, key: &str, reason: impl Into<String>) -> Self {
        Self::Tensor { path: path.to_owned(), key: key.to_owned(), reason: reason.into() }
    }
    pub(crate) fn layer(layer: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Layer { layer: layer.into(), reason: reason.into() }
    }
}
