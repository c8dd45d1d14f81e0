//! Sections of the configuration: fields with a help text, a unit, a default and bounds, each written once.
//!
//! [`section!`] generates the struct, its `Default`, its bounds check and its rows in docs/CONFIG.md from one
//! definition, so that they cannot differ. The doc comment of a field is its help text.

use std::ops::RangeInclusive;

use super::SettingError;

/// One setting, as docs/CONFIG.md shows it.
#[derive(Clone, Debug)]
pub struct Field {
    /// Its key in the section.
    pub name: &'static str,
    /// Its help text.
    pub text: String,
    /// Unit of its number; empty if it has none.
    pub unit: &'static str,
    /// Minimum and maximum.
    pub bounds: Option<RangeInclusive<u64>>,
}

/// One section, as docs/CONFIG.md shows it.
#[derive(Clone, Debug)]
pub struct Section {
    /// Its key in the file.
    pub name: &'static str,
    /// Its help text.
    pub text: String,
    /// Its settings, in the order of the struct.
    pub fields: Vec<Field>,
}

/// A value with optional bounds.
pub trait Figure {
    /// The number; `None` if the setting is not given, so that no bound applies.
    fn figure(&self) -> Option<u64>;
}

impl Figure for u64 {
    fn figure(&self) -> Option<u64> {
        Some(*self)
    }
}

impl Figure for u32 {
    fn figure(&self) -> Option<u64> {
        Some(u64::from(*self))
    }
}

impl Figure for usize {
    fn figure(&self) -> Option<u64> {
        Some(u64::try_from(*self).unwrap_or(u64::MAX))
    }
}

impl<T: Figure> Figure for Option<T> {
    fn figure(&self) -> Option<u64> {
        self.as_ref().and_then(Figure::figure)
    }
}

/// Compares a number with its bounds.
///
/// # Errors
/// It is out of bounds. The error names the field's path, the number and the bounds.
pub fn check(
    section: &str,
    name: &str,
    value: &impl Figure,
    bounds: &RangeInclusive<u64>,
    unit: &str,
) -> Result<(), SettingError> {
    match value.figure() {
        Some(figure) if !bounds.contains(&figure) => Err(SettingError::new(
            format!("{section}.{name}"),
            format!(
                "{figure} is out of range: {} to {} {unit} are allowed",
                bounds.start(),
                bounds.end()
            ),
        )),
        Some(_) | None => Ok(()),
    }
}

/// Joins the lines of doc comments to one text. An empty line begins a paragraph.
#[must_use]
pub fn joined(lines: &[&str]) -> String {
    let mut text = String::new();
    for line in lines {
        let line = line.trim();
        if line.is_empty() {
            text.push_str("\n\n");
        } else {
            if !text.is_empty() && !text.ends_with('\n') {
                text.push(' ');
            }
            text.push_str(line);
        }
    }
    text
}

/// Defines a section: `field: type = default`, and for numbers also `, "unit", bounds`.
macro_rules! section {
    (
        $(#[doc = $text:literal])+
        pub struct $name:ident = $key:literal {
            $(
                $(#[doc = $help:literal])+
                $(#[serde($($serde:tt)+)])?
                pub $field:ident: $kind:ty = $default:expr $(, $unit:literal, $bounds:expr)?;
            )+
        }
    ) => {
        $(#[doc = $text])+
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            $(
                $(#[doc = $help])+
                $(#[serde($($serde)+)])?
                pub $field: $kind,
            )+
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)+ }
            }
        }

        impl $name {
            /// The rows of this section in docs/CONFIG.md.
            #[must_use]
            pub fn describe() -> $crate::runtime::config::section::Section {
                $crate::runtime::config::section::Section {
                    name: $key,
                    text: $crate::runtime::config::section::joined(&[$($text),+]),
                    fields: vec![$(
                        $crate::runtime::config::section::Field {
                            name: stringify!($field),
                            text: $crate::runtime::config::section::joined(&[$($help),+]),
                            unit: concat!($($unit)?),
                            bounds: [$($bounds)?].into_iter().next(),
                        },
                    )+],
                }
            }

            /// Compares every number with its bounds.
            ///
            /// # Errors
            /// The first that is out of bounds, by its path.
            pub fn check_bounds(&self) -> Result<(), $crate::runtime::config::SettingError> {
                $($(
                    $crate::runtime::config::section::check($key, stringify!($field), &self.$field, &$bounds, $unit)?;
                )?)+
                Ok(())
            }
        }
    };
}

pub(crate) use section;
