//! The address of a database, whose password no log and no error ever shows.

use std::{fmt, path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};

/// `postgres://…`, `postgresql://…`, or `sqlite:PATH`. `Debug` and `Display` leave the password out.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DatabaseUrl(String);

/// Which database a [`DatabaseUrl`] is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatabaseKind {
    /// A file beside the gateway.
    Sqlite,
    /// A server.
    Postgres,
}

impl DatabaseUrl {
    /// The file that is used where no database is configured.
    #[must_use]
    pub fn sqlite(path: &std::path::Path) -> Self {
        Self(format!("sqlite:{}", path.display()))
    }

    /// The whole address, password included: for the driver only.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether it holds a password, or may: in its user information or in a parameter.
    #[must_use]
    pub fn has_password(&self) -> bool {
        self.kind() == DatabaseKind::Postgres
            && (self.0.contains("password=")
                || self
                    .0
                    .rsplit_once('@')
                    .is_some_and(|(user, _)| user.matches(':').count() > 1))
    }

    /// Which database it is for.
    #[must_use]
    pub fn kind(&self) -> DatabaseKind {
        if self.0.starts_with("sqlite:") {
            DatabaseKind::Sqlite
        } else {
            DatabaseKind::Postgres
        }
    }

    /// The file of an SQLite database.
    #[must_use]
    pub fn sqlite_path(&self) -> Option<PathBuf> {
        let path = self.0.strip_prefix("sqlite:")?;
        Some(PathBuf::from(path.strip_prefix("//").unwrap_or(path)))
    }
}

impl FromStr for DatabaseUrl {
    type Err = InvalidDatabaseUrl;

    fn from_str(text: &str) -> Result<Self, InvalidDatabaseUrl> {
        let rest = ["postgres://", "postgresql://", "sqlite:"]
            .iter()
            .find_map(|scheme| text.strip_prefix(scheme));
        match rest {
            Some(rest) if !rest.is_empty() && !text.chars().any(char::is_control) => Ok(Self(text.to_owned())),
            Some(_) | None => Err(InvalidDatabaseUrl),
        }
    }
}

impl TryFrom<String> for DatabaseUrl {
    type Error = InvalidDatabaseUrl;

    fn try_from(text: String) -> Result<Self, InvalidDatabaseUrl> {
        text.parse()
    }
}

impl From<DatabaseUrl> for String {
    fn from(url: DatabaseUrl) -> Self {
        url.0
    }
}

/// Without the password, and without parameters, which may hold one too.
impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.kind() == DatabaseKind::Sqlite {
            return f.write_str(&self.0);
        }
        let (scheme, rest) = self.0.split_once("://").unwrap_or(("postgres", ""));
        let rest = rest.split(['?', '#']).next().unwrap_or_default();
        match rest.rsplit_once('@') {
            Some((user, host)) => write!(f, "{scheme}://{}@{host}", user.split(':').next().unwrap_or_default()),
            None => write!(f, "{scheme}://{rest}"),
        }
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is no address of a database that Seawall knows. It is not repeated: it may hold a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected postgres://USER:PASSWORD@HOST/NAME or sqlite:PATH")]
pub struct InvalidDatabaseUrl;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn password_is_never_shown() {
        let url: DatabaseUrl = "postgres://sea:p@ss:wall@db.example:5432/fleet?password=other"
            .parse()
            .unwrap();

        assert_eq!(
            format!("{url} {url:?}"),
            "postgres://sea@db.example:5432/fleet postgres://sea@db.example:5432/fleet"
        );
    }

    #[test]
    fn sqlite_takes_a_path_with_or_without_slashes() {
        for (text, path) in [
            ("sqlite:a/b.db", "a/b.db"),
            ("sqlite:///a/b.db", "/a/b.db"),
            ("sqlite:/a/b.db", "/a/b.db"),
        ] {
            let url: DatabaseUrl = text.parse().unwrap();

            assert_eq!(
                (url.kind(), url.sqlite_path()),
                (DatabaseKind::Sqlite, Some(path.into())),
                "{text}"
            );
        }
    }

    #[test]
    fn other_addresses_are_refused_without_an_echo() {
        for text in ["", "mysql://u:hidden@h/d", "postgres://", "sqlite:", "postgres://h/d\n"] {
            let error = text.parse::<DatabaseUrl>().unwrap_err();

            assert!(!error.to_string().contains("hidden"), "{text}");
        }
    }
}
