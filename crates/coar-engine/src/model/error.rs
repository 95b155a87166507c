use std::path::PathBuf;

use coar_core::tokenizer::TokenizerError;

/// Why a checkpoint could not be read or a tensor operation failed.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file is missing, unreadable, truncated or of the wrong form.
    #[error("{}: {problem}", file.display())]
    File { file: PathBuf, problem: String },
    /// One tensor of a file is missing or does not match the configuration.
    #[error("{}: tensor `{tensor}` {problem}", file.display())]
    Tensor {
        file: PathBuf,
        tensor: String,
        problem: String,
    },
    /// A field of a configuration file has a value that this implementation cannot run.
    #[error("{}: `{field}` {problem}", file.display())]
    Config {
        file: PathBuf,
        field: String,
        problem: String,
    },
    /// A caller's value is outside its limits.
    #[error("`{field}` {problem}")]
    Invalid { field: &'static str, problem: String },
    /// libtorch refused an operation.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}

impl From<TokenizerError> for ModelError {
    fn from(error: TokenizerError) -> Self {
        match error {
            TokenizerError::File { file, problem } => Self::File { file, problem },
            TokenizerError::Invalid { field, problem } => Self::Invalid { field, problem },
        }
    }
}

impl ModelError {
    /// A file that cannot be used.
    pub fn file(file: impl Into<PathBuf>, problem: impl ToString) -> Self {
        Self::File {
            file: file.into(),
            problem: problem.to_string(),
        }
    }
    /// A value outside its limits.
    pub fn invalid(field: &'static str, problem: impl Into<String>) -> Self {
        Self::Invalid {
            field,
            problem: problem.into(),
        }
    }
}
