//! Closed enums whose values have names in metrics, logs and documents.

/// Defines an enum with a name for each value: `ALL`, in the order of the enum, and `as_str`.
///
/// ```
/// seawall_proto::labels! {
///     /// State of a valve.
///     #[derive(Clone, Copy, Debug, PartialEq, Eq)]
///     pub enum Valve {
///         Open = "open",
///         HalfOpen = "half_open",
///     }
/// }
///
/// assert_eq!(Valve::HalfOpen.as_str(), "half_open");
/// assert_eq!(Valve::ALL, [Valve::Open, Valve::HalfOpen]);
/// ```
#[macro_export]
macro_rules! labels {
    (
        $(#[$attribute:meta])*
        $visibility:vis enum $name:ident {
            $($(#[$of_variant:meta])* $variant:ident = $word:literal,)+
        }
    ) => {
        $(#[$attribute])*
        $visibility enum $name {
            $($(#[$of_variant])* $variant,)+
        }

        impl $name {
            /// Every value, in the order of the enum.
            $visibility const ALL: [Self; [$($word),+].len()] = [$(Self::$variant),+];

            /// Name in metrics, logs and documents.
            #[must_use]
            $visibility const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)+
                }
            }
        }
    };
}
