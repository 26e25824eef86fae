//! Names by which command lines and other languages choose: of types, spellings and arithmetic.

use std::fmt;
use std::str::FromStr;

use crate::{Dtype, Error, Format, Precision, Result};

fn unknown(what: &str, text: &str, names: &str) -> Error {
    Error::Invalid(format!("{what}: `{text}`, but it is {names}"))
}

/// `f16`, `bf16` or `f32`.
impl FromStr for Dtype {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut all = [Self::F16, Self::Bf16, Self::F32].into_iter();
        all.find(|dtype| dtype.name() == text).ok_or_else(|| unknown("dtype", text, "`f16`, `bf16` or `f32`"))
    }
}

/// `peft` (or `diffusers`), `kohya`, `comfyui`, `bfl` or `xlabs`.
impl FromStr for Format {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "diffusers" => Ok(Self::Peft),
            _ => Self::ALL.into_iter().find(|format| format.name() == text).ok_or_else(|| {
                unknown("format", text, "`peft` (or `diffusers`), `kohya`, `comfyui`, `bfl` or `xlabs`")
            }),
        }
    }
}

/// `auto`, `fast`, `f64` or `double-single`.
impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Fast => "fast",
            Self::F64 => "f64",
            Self::DoubleSingle => "double-single",
        })
    }
}

impl FromStr for Precision {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "fast" => Ok(Self::Fast),
            "f64" => Ok(Self::F64),
            "double-single" => Ok(Self::DoubleSingle),
            _ => Err(unknown("precision", text, "`auto`, `fast`, `f64` or `double-single`")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
            assert_eq!(dtype.to_string().parse::<Dtype>().unwrap(), dtype);
        }
        for format in Format::ALL {
            assert_eq!(format.to_string().parse::<Format>().unwrap(), format);
        }
        assert_eq!("diffusers".parse::<Format>().unwrap(), Format::Peft);
        for precision in [Precision::Auto, Precision::Fast, Precision::F64, Precision::DoubleSingle] {
            assert_eq!(precision.to_string().parse::<Precision>().unwrap(), precision);
        }
        let said = |error: Error| error.to_string();
        assert!(said("f64".parse::<Dtype>().unwrap_err()).contains("`bf16`"));
        assert!(said("same".parse::<Format>().unwrap_err()).contains("`kohya`"));
        assert!(said("f32".parse::<Precision>().unwrap_err()).contains("`double-single`"));
    }
}
