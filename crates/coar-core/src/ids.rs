//! Typed identifiers: UUIDv7 with a prefix, so they sort by time and cannot be confused.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

/// A string that is not an identifier of the expected type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("is not an identifier of the form `{0}…`")]
pub struct InvalidId(&'static str);

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident = $prefix:literal),+ $(,)?) => { $(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Uuid);

        impl $name {
            /// A new identifier.
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "_{}"), self.0.simple())
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let invalid = InvalidId(concat!($prefix, "_"));
                let uuid = text.strip_prefix(concat!($prefix, "_")).ok_or_else(|| invalid.clone())?;
                let id = Uuid::try_parse(uuid).map(Self).map_err(|_| invalid.clone())?;
                // Other spellings of the same UUID are rejected.
                if id.to_string() == text { Ok(id) } else { Err(invalid) }
            }
        }
    )+ };
}

ids! {
    /// A concept, over all its versions.
    ConceptId = "concept",
    /// One training of a concept.
    TrainingId = "training",
    /// One request for images and its result.
    GenerationId = "generation",
    /// A generated image.
    ImageId = "image",
    /// The owner of concepts and images.
    TenantId = "tenant",
    /// An API key; not the key itself.
    KeyId = "key",
    /// One webhook delivery, over all attempts.
    DeliveryId = "delivery",
    /// A running program: an API process, a worker, or both in one.
    ProcessId = "process",
}

impl TenantId {
    /// The tenant `default`: used without API keys, and by the command line.
    pub const DEFAULT: Self = Self(Uuid::nil());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_and_types_are_distinct() {
        let id = ConceptId::new();
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!(id.to_string().parse::<TrainingId>().is_err());
        assert!("concept_xyz".parse::<ConceptId>().is_err());
        assert!(
            id.to_string()
                .to_uppercase()
                .replace("CONCEPT", "concept")
                .parse::<ConceptId>()
                .is_err()
        );
        assert!(
            "concept_01990000-0000-7000-8000-000000000000"
                .parse::<ConceptId>()
                .is_err()
        );
    }
}
