//! `--dtype`, `--device` and `--threads` as typed, before the machine and the checkpoint are looked at.

use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;

/// Element type that weights are kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DtypeChoice {
    /// The type the checkpoint is stored in.
    #[default]
    Auto,
    Bf16,
    F16,
    F32,
}

impl FromStr for DtypeChoice {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => Ok(Self::Auto),
            "bf16" | "bfloat16" => Ok(Self::Bf16),
            "f16" | "float16" | "half" => Ok(Self::F16),
            "f32" | "float32" => Ok(Self::F32),
            _ => Err(format!("unknown dtype `{s}`: use auto, bf16, f16 or f32")),
        }
    }
}

impl fmt::Display for DtypeChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        })
    }
}

/// Where the model runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The first CUDA device when this build and machine have one, else the CPU.
    #[default]
    Auto,
    Cpu,
    /// A CUDA device by ordinal.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => return Ok(Self::Auto),
            "cpu" => return Ok(Self::Cpu),
            "cuda" => return Ok(Self::Cuda(0)),
            _ => {}
        }
        if let Some(ordinal) = s.strip_prefix("cuda:") {
            return ordinal
                .parse()
                .map(Self::Cuda)
                .map_err(|_| format!("`{ordinal}` is no CUDA device number: write cuda:0, cuda:1, …"));
        }
        Err(format!("unknown device `{s}`: use auto, cpu, cuda or cuda:N"))
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

/// How many threads compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Threads(NonZeroUsize);

impl Threads {
    /// More than any machine has cores: a slip of the finger.
    const MAX: usize = 4096;

    /// The number.
    pub fn get(self) -> usize {
        self.0.get()
    }
}

impl FromStr for Threads {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let number = s.parse().ok().filter(|n: &NonZeroUsize| n.get() <= Self::MAX);
        number.map(Self).ok_or_else(|| {
            format!("must be a whole number from 1 to {}; leave it out for one thread per core", Self::MAX)
        })
    }
}

impl fmt::Display for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_read_back_what_they_print_and_refuse_the_rest() {
        for s in ["auto", "bf16", "f16", "f32"] {
            assert_eq!(s.parse::<DtypeChoice>().unwrap().to_string(), s);
        }
        for s in ["auto", "cpu", "cuda:0", "cuda:3"] {
            assert_eq!(s.parse::<DeviceChoice>().unwrap().to_string(), s);
        }
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        assert!("int8".parse::<DtypeChoice>().unwrap_err().contains("bf16"));
        assert!("cuda:x".parse::<DeviceChoice>().unwrap_err().contains("cuda:0"));
        assert!("tpu".parse::<DeviceChoice>().unwrap_err().contains("cpu"));
    }

    #[test]
    fn threads_are_at_least_one() {
        assert_eq!("3".parse::<Threads>().unwrap().get(), 3);
        for s in ["0", "-1", "two", "5000", ""] {
            assert!(s.parse::<Threads>().unwrap_err().contains("from 1 to 4096"), "{s}");
        }
    }
}
