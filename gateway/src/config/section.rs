//! What a section of the configuration is made of: fields with a help text, a unit, a default and bounds, written once.
//!
//! [`section!`] turns one definition into the struct, its `Default`, its bounds check and its rows in docs/CONFIG.md, so
//! that none of them can differ from the others. The doc comment of a field is its help text.

use std::ops::RangeInclusive;

use super::SettingError;

/// One setting, as docs/CONFIG.md shows it.
#[derive(Clone, Debug)]
pub struct Field {
    /// Its key in the section.
    pub name: &'static str,
    /// What it does.
    pub text: String,
    /// What its figure counts; empty where it has none.
    pub unit: &'static str,
    /// Smallest and greatest figure allowed.
    pub bounds: Option<RangeInclusive<u64>>,
}

/// One section, as docs/CONFIG.md shows it.
#[derive(Clone, Debug)]
pub struct Section {
    /// Its key in the file.
    pub name: &'static str,
    /// What it is about.
    pub text: String,
    /// Its settings, in the order of the struct.
    pub fields: Vec<Field>,
}

/// A value that bounds can be checked on.
pub trait Figure {
    /// The figure; `None` where the setting is not given, so that no bound applies.
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

/// Compares one figure with its bounds.
///
/// # Errors
/// Out of them: the error names the field's path, the figure and what is allowed.
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

/// Joins the lines of doc comments to one text; an empty line begins a paragraph.
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

/// Defines a section: `field: type = default`, and for figures also `, "unit", bounds`.
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
            pub fn describe() -> $crate::config::section::Section {
                $crate::config::section::Section {
                    name: $key,
                    text: $crate::config::section::joined(&[$($text),+]),
                    fields: vec![$(
                        $crate::config::section::Field {
                            name: stringify!($field),
                            text: $crate::config::section::joined(&[$($help),+]),
                            unit: concat!($($unit)?),
                            bounds: [$($bounds)?].into_iter().next(),
                        },
                    )+],
                }
            }

            /// Compares every figure with its bounds.
            ///
            /// # Errors
            /// The first that is out of them, by its path.
            pub fn check_bounds(&self) -> Result<(), $crate::config::SettingError> {
                $($(
                    $crate::config::section::check($key, stringify!($field), &self.$field, &$bounds, $unit)?;
                )?)+
                Ok(())
            }
        }
    };
}

pub(crate) use section;
