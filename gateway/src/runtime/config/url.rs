//! The URL of a database. Its password is never in a log or an error.

use std::{
    fmt,
    io::Read as _,
    net::{IpAddr, Ipv6Addr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// `postgres://…`, `postgresql://…`, or `sqlite:PATH`. `Debug` and `Display` leave the password out.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DatabaseUrl(String);

/// Kind of database of a [`DatabaseUrl`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatabaseKind {
    /// A local file.
    Sqlite,
    /// A server.
    Postgres,
}

impl DatabaseUrl {
    /// The file that is used if no database is configured.
    #[must_use]
    pub fn sqlite(path: &std::path::Path) -> Self {
        Self(format!("sqlite:{}", path.display()))
    }

    /// The whole URL, with its password, for the driver only.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether it has, or may have, a password: in its user information or in a parameter.
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

    /// The URL in the driver's own form, with its password. Parameters that only Seawall knows are left out. An IPv6
    /// host becomes a parameter, because the driver takes the brackets for a part of the name.
    #[must_use]
    pub fn for_driver(&self) -> String {
        let (place, query) = self.0.split_once('?').unwrap_or((&self.0, ""));
        let mut parameters: Vec<_> = query
            .split('&')
            .filter(|parameter| !parameter.is_empty() && parameter_value(parameter, "connect_timeout").is_none())
            .map(str::to_owned)
            .collect();
        let mut place = place.to_owned();
        if let (Some(open), Some(close)) = (place.rfind('['), place.rfind(']')) {
            if open < close && !parameters.iter().any(|parameter| parameter.starts_with("host")) {
                parameters.push(format!("host={}", &place[open + 1..close]));
            }
            place.replace_range(open..=close, "localhost");
        }
        if parameters.is_empty() {
            return place;
        }
        format!("{place}?{}", parameters.join("&"))
    }

    /// Maximum time for making a connection, if the URL has one.
    #[must_use]
    pub fn connect_timeout(&self) -> Option<Duration> {
        self.parameter("connect_timeout")?.parse().ok().map(Duration::from_secs)
    }

    /// Checks the environment variables that the driver uses for what the URL leaves out. The driver itself ignores a
    /// value that it does not understand: a misspelt `PGSSLMODE` would turn TLS checks off.
    ///
    /// # Errors
    /// A variable is not valid. The error names it, and does not repeat its value.
    pub fn check_environment(&self, variable: impl Fn(&str) -> Option<String>) -> Result<(), InvalidDatabaseUrl> {
        let place = self.0.split_once("://").map_or("", |(_, rest)| rest);
        let authority = place.split(['/', '?']).next().unwrap_or_default();
        let address = authority.rsplit_once('@').map_or(authority, |(_, address)| address);
        let has_host = !address.is_empty() || self.parameter("host").is_some() || self.parameter("hostaddr").is_some();
        let after_host = address.rsplit_once(']').map_or(address, |(_, after)| after);
        let has_port = after_host.contains(':') || self.parameter("port").is_some();
        let has_mode = self.parameter("sslmode").is_some() || self.parameter("ssl-mode").is_some();
        for (name, parameter, is_overridden) in [
            ("PGSSLMODE", "sslmode", has_mode),
            ("PGPORT", "port", has_port),
            ("PGHOST", "host", has_host),
            ("PGHOSTADDR", "hostaddr", has_host),
        ] {
            if !is_overridden
                && let Some(value) = variable(name)
                && let Some(expected) = expected_instead(parameter, &value)
            {
                return Err(InvalidDatabaseUrl::Variable(name, expected));
            }
        }
        Ok(())
    }

    /// Checks the files that the driver reads for TLS: those of the URL, else those of its environment variables.
    ///
    /// # Errors
    /// A file cannot be read. The error names the parameter or the variable alone.
    pub fn check_files(&self, variable: impl Fn(&str) -> Option<String>) -> Result<(), InvalidDatabaseUrl> {
        const UNREADABLE: &str = "the file cannot be read";
        for (names, variable_name) in FILE_PARAMETERS {
            let given = names.iter().find_map(|name| Some((*name, self.parameter(name)?)));
            let (path, error) = match given {
                Some((name, value)) => (
                    percent_decoded(value).unwrap_or_default(),
                    InvalidDatabaseUrl::Value(name, UNREADABLE),
                ),
                None => match variable(variable_name) {
                    Some(path) => (path, InvalidDatabaseUrl::Variable(variable_name, UNREADABLE)),
                    None => continue,
                },
            };
            // The driver takes the content itself as well.
            if !path.trim_start().starts_with("-----BEGIN") && !is_readable(&path) {
                return Err(error);
            }
        }
        Ok(())
    }

    fn parameter(&self, name: &str) -> Option<&str> {
        let (_, query) = self.0.split_once('?')?;
        query.split('&').find_map(|parameter| parameter_value(parameter, name))
    }

    /// Path of an SQLite database.
    #[must_use]
    pub fn sqlite_path(&self) -> Option<PathBuf> {
        let path = self.0.strip_prefix("sqlite:")?;
        Some(PathBuf::from(path.strip_prefix("//").unwrap_or(path)))
    }
}

/// Parameters that name a file, and the variable that the driver reads if none of them is given.
const FILE_PARAMETERS: [(&[&str], &str); 3] = [
    (&["sslrootcert", "ssl-root-cert", "ssl-ca"], "PGSSLROOTCERT"),
    (&["sslcert", "ssl-cert"], "PGSSLCERT"),
    (&["sslkey", "ssl-key"], "PGSSLKEY"),
];

fn is_readable(path: &str) -> bool {
    let read = std::fs::File::open(path).and_then(|mut file| file.read(&mut [0]));
    read.is_ok_and(|len| len > 0)
}

fn parameter_value<'a>(parameter: &'a str, name: &str) -> Option<&'a str> {
    let (key, value) = parameter.split_once('=')?;
    (key == name).then_some(value)
}

impl FromStr for DatabaseUrl {
    type Err = InvalidDatabaseUrl;

    fn from_str(text: &str) -> Result<Self, InvalidDatabaseUrl> {
        let rest = ["postgres://", "postgresql://", "sqlite:"]
            .iter()
            .find_map(|scheme| text.strip_prefix(scheme));
        match rest {
            Some(rest) if !rest.is_empty() && !text.chars().any(char::is_control) => {
                if !text.starts_with("sqlite:") {
                    check_postgres(rest)?;
                    return Ok(Self(text.to_owned()));
                }
                check_sqlite(rest)?;
                // The file is opened in this mode without it.
                Ok(Self(text.split('?').next().unwrap_or(text).to_owned()))
            }
            Some(_) | None => Err(InvalidDatabaseUrl::Form),
        }
    }
}

/// Parameters of a `postgres://` URL that are passed to the driver; `options[NAME]` is one as well.
const DRIVER_PARAMETERS: [&str; 17] = [
    "application_name",
    "dbname",
    "host",
    "hostaddr",
    "options",
    "password",
    "port",
    "ssl-ca",
    "ssl-cert",
    "ssl-key",
    "ssl-mode",
    "ssl-root-cert",
    "sslcert",
    "sslkey",
    "sslmode",
    "sslrootcert",
    "user",
];
const SSL_MODES: [&str; 6] = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];
/// Maximum `connect_timeout`, in seconds.
const CONNECT_TIMEOUT_SECONDS_MAX: u64 = 60;
/// Maximum length of a parameter's name that an error repeats.
const NAME_LEN_MAX: usize = 40;

/// Checks the part after `sqlite:`: a path, and at most the parameter `mode=rwc`.
fn check_sqlite(rest: &str) -> Result<(), InvalidDatabaseUrl> {
    use InvalidDatabaseUrl as Invalid;
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = path.strip_prefix("//").unwrap_or(path);
    if path.is_empty() {
        return Err(Invalid::Form);
    }
    if path.trim_start_matches("file:").starts_with(":memory:") {
        return Err(Invalid::InMemory);
    }
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        match parameter.split_once('=').unwrap_or((parameter, "")) {
            ("mode", "rwc") => {}
            ("mode", _) => return Err(Invalid::Value("mode", "expected rwc")),
            (name, _) if is_plain_name(name) => return Err(Invalid::SqliteParameter(name.to_owned())),
            _ => return Err(Invalid::Form),
        }
    }
    Ok(())
}

/// Checks the part after `postgres://`. Every part may be a piece of a password whose special characters are not
/// percent-encoded. So an error repeats nothing except the name of a parameter, where no such piece can occur.
fn check_postgres(rest: &str) -> Result<(), InvalidDatabaseUrl> {
    use InvalidDatabaseUrl as Invalid;
    if rest.contains('#') || rest.contains(char::is_whitespace) {
        return Err(Invalid::NotEncoded);
    }
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, database) = place.split_once('/').unwrap_or((place, ""));
    if database.contains(['@', '/', ':']) {
        return Err(Invalid::NotEncoded);
    }
    let (user, address) = authority.rsplit_once('@').unwrap_or(("", authority));
    if !authority.contains('@') && query.contains('@') {
        return Err(Invalid::NotEncoded);
    }
    if !is_percent_encoded(rest) {
        return Err(Invalid::NotEncoded);
    }
    check_address(address, !user.is_empty())?;
    let parameters = query.split('&').filter(|parameter| !parameter.is_empty());
    let mut seen = Vec::new();
    for parameter in parameters {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let Some(known) = known_parameter(name) else {
            // Behind `password` it may be a piece of that.
            let is_unsure = query.contains('@') || seen.contains(&"password");
            return Err(if is_unsure || !is_plain_name(name) {
                Invalid::NotEncoded
            } else {
                Invalid::Parameter(name.to_owned())
            });
        };
        if seen.contains(&known) && !known.starts_with("options") {
            return Err(Invalid::Value(known, "may be given once"));
        }
        seen.push(known);
        if let Some(expected) = expected_instead(known, value) {
            return Err(Invalid::Value(known, expected));
        }
    }
    Ok(())
}

/// A host (a name, an address or an IPv6 address in brackets) and its port.
fn check_address(address: &str, has_user: bool) -> Result<(), InvalidDatabaseUrl> {
    use InvalidDatabaseUrl as Invalid;
    if address.contains(',') {
        return Err(Invalid::SeveralHosts);
    }
    let (host, port) = match address.strip_prefix('[') {
        Some(literal) => {
            let (host, port) = literal.split_once(']').ok_or(Invalid::Host)?;
            if host.parse::<Ipv6Addr>().is_err() {
                return Err(Invalid::Host);
            }
            (host, port)
        }
        None => match address.find(':') {
            Some(at) => address.split_at(at),
            None => (address, ""),
        },
    };
    if host.is_empty() && (has_user || !port.is_empty()) {
        return Err(Invalid::Host);
    }
    let is_name = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_' | '%' | ':');
    if !host.chars().all(is_name) {
        return Err(Invalid::Host);
    }
    match port.strip_prefix(':') {
        None if port.is_empty() => Ok(()),
        Some(port) if is_port(port) => Ok(()),
        Some(_) | None => Err(Invalid::Port),
    }
}

fn known_parameter(name: &str) -> Option<&'static str> {
    if name.starts_with("options[") && name.ends_with(']') || name.starts_with("options%5B") && name.ends_with("%5D") {
        return Some("options[…]");
    }
    let own = ["connect_timeout", "statement-cache-capacity"];
    DRIVER_PARAMETERS.into_iter().chain(own).find(|known| *known == name)
}

/// The expected value, if it is invalid.
fn expected_instead(name: &str, value: &str) -> Option<&'static str> {
    match name {
        "sslmode" | "ssl-mode" if !SSL_MODES.contains(&value) => {
            Some("expected disable, allow, prefer, require, verify-ca or verify-full")
        }
        "port" if !is_port(value) => Some("expected a number from 1 to 65535"),
        "hostaddr" if decoded(value).parse::<IpAddr>().is_err() => Some("expected an IP address"),
        "host" if value.contains(',') || value.contains("%2C") || value.contains("%2c") => {
            Some("one host is possible: give the name of the primary, or of a proxy before the servers")
        }
        "connect_timeout"
            if !value
                .parse()
                .is_ok_and(|seconds| (1..=CONNECT_TIMEOUT_SECONDS_MAX).contains(&seconds)) =>
        {
            Some("expected seconds, 1 to 60")
        }
        "statement-cache-capacity" if value.parse::<u32>().is_err() => Some("expected a number"),
        _ => None,
    }
}

fn is_port(text: &str) -> bool {
    text.parse::<u16>().is_ok_and(|port| port > 0)
}

fn is_plain_name(name: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphabetic() || c == '_' || c == '-';
    !name.is_empty() && name.len() <= NAME_LEN_MAX && name.chars().all(is_plain)
}

/// Whether each `%` is followed by two hexadecimal digits, and the decoded bytes are UTF-8.
fn is_percent_encoded(text: &str) -> bool {
    percent_decoded(text).is_some()
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let [high, low, tail @ ..] = tail else { return None };
        let digit = |digit: u8| {
            char::from(digit)
                .to_digit(16)
                .and_then(|digit| u8::try_from(digit).ok())
        };
        let (high, low) = (digit(*high)?, digit(*low)?);
        bytes.push(high << 4 | low);
        rest = tail;
    }
    // A zero byte would end the text for the server.
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

/// The colons of an IPv6 address may be encoded in a parameter.
fn decoded(value: &str) -> String {
    value.replace("%3A", ":").replace("%3a", ":")
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

/// Leaves out the password, and the parameters, which may contain one as well.
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

/// The text is not the URL of a supported database. The error repeats nothing except the name of a parameter: the rest
/// may be a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidDatabaseUrl {
    #[error("expected postgres://USER:PASSWORD@HOST/NAME or sqlite:PATH")]
    Form,
    /// A special character in a wrong place: most likely it belongs to the password.
    #[error(
        "expected postgres://USER:PASSWORD@HOST/NAME?PARAMETER=VALUE: percent-encode special characters of the password \
         (# as %23, / as %2F, ? as %3F, @ as %40, % as %25, a blank as %20)"
    )]
    NotEncoded,
    #[error("the host is not valid: expected a name, an IPv4 address, or an IPv6 address in brackets")]
    Host,
    #[error(
        "the port is not a number from 1 to 65535; if it is a part of the password, percent-encode special characters there \
         (/ as %2F, @ as %40)"
    )]
    Port,
    #[error("one host is possible: give the name of the primary, or of a proxy before the servers")]
    SeveralHosts,
    #[error(
        "unknown parameter {0}: known are sslmode, sslrootcert, sslcert, sslkey, connect_timeout, host, hostaddr, port, user, password, \
         dbname, application_name, options and statement-cache-capacity"
    )]
    Parameter(String),
    #[error("unknown parameter {0} of an SQLite database: known is mode=rwc")]
    SqliteParameter(String),
    #[error("an SQLite database in memory is not possible: expected sqlite:PATH")]
    InMemory,
    #[error("parameter {0}: {1}")]
    Value(&'static str, &'static str),
    /// A variable that applies because the URL leaves the parameter out.
    #[error("environment variable {0}: {1}")]
    Variable(&'static str, &'static str),
}

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
    fn no_part_of_an_unencoded_password_is_repeated() {
        for mark in [
            "#",
            "?",
            "/",
            "@/",
            "?x@",
            "#@",
            ":@/",
            "%",
            "%zz",
            " ",
            "[",
            "]",
            ",",
            "\\",
            "?a&b=",
            "?sslmode=",
        ] {
            for head in ["Sup3r", "1234", "wort"] {
                let text = format!("postgres://fleet:{head}{mark}tail@127.0.0.1:5/fleet");

                match text.parse::<DatabaseUrl>() {
                    Err(error) => {
                        let shown = format!("{error} {error:?}");
                        assert!(!shown.contains(head) && !shown.contains("tail"), "{text}: {shown}");
                    }
                    // Accepted if the driver finds the intended host and password in it.
                    Ok(url) => assert_eq!(url.to_string(), "postgres://fleet@127.0.0.1:5/fleet", "{text}"),
                }
            }
        }
    }

    #[test]
    fn unknown_parameter_is_named_without_its_value() {
        for name in [
            "sslmod",
            "ssl_mode",
            "sslMode",
            "SSLMODE",
            "channel_binding",
            "target_session_attrs",
        ] {
            let text = format!("postgres://fleet@127.0.0.1:5/fleet?sslmode=require&{name}=hidden");

            let error = text.parse::<DatabaseUrl>().unwrap_err();

            assert_eq!(error, InvalidDatabaseUrl::Parameter(name.into()));
            assert!(!error.to_string().contains("hidden"), "{error}");
        }
    }

    #[test]
    fn wrong_value_of_a_parameter_is_not_repeated() {
        for (parameter, name) in [
            ("sslmode=hidden", "sslmode"),
            ("sslmode", "sslmode"),
            ("port=hidden", "port"),
            ("hostaddr=hidden", "hostaddr"),
            ("host=hidden,hidden", "host"),
            ("connect_timeout=0", "connect_timeout"),
            ("connect_timeout=61", "connect_timeout"),
            ("statement-cache-capacity=hidden", "statement-cache-capacity"),
            ("sslmode=require&sslmode=disable", "sslmode"),
        ] {
            let text = format!("postgres://fleet@127.0.0.1:5/fleet?{parameter}");

            let error = text.parse::<DatabaseUrl>().unwrap_err();

            assert!(
                matches!(error, InvalidDatabaseUrl::Value(named, _) if named == name),
                "{error}"
            );
            assert!(!error.to_string().contains("hidden"), "{error}");
        }
    }

    #[test]
    fn wrong_variable_of_the_driver_is_named_unless_the_url_overrides_it() {
        let check = |url: &str, name: &str, value: &str| {
            let variable = |asked: &str| (asked == name).then(|| value.to_owned());
            url.parse::<DatabaseUrl>().unwrap().check_environment(variable)
        };
        let plain = "postgres://fleet:p%3Aw@db.example/fleet";

        for (url, name, value) in [
            (plain, "PGSSLMODE", "verify_full"),
            (plain, "PGSSLMODE", ""),
            (plain, "PGPORT", "54x2"),
            ("postgres://fleet@[::1]/fleet", "PGPORT", "0"),
            ("postgres:///fleet", "PGHOST", "a,b"),
            ("postgres:///fleet", "PGHOSTADDR", "hidden"),
        ] {
            let error = check(url, name, value).unwrap_err();
            assert!(
                matches!(error, InvalidDatabaseUrl::Variable(named, _) if named == name),
                "{error}"
            );
            assert!(!error.to_string().contains("hidden"), "{error}");
        }
        for (url, name, value) in [
            (plain, "PGSSLMODE", "verify-full"),
            (plain, "PGPORT", "5433"),
            (plain, "PGHOST", "a,b"),
            ("postgres://fleet@h/fleet?sslmode=verify-full", "PGSSLMODE", "x"),
            ("postgres://fleet@[::1]:5/fleet", "PGPORT", "x"),
            ("postgres:///fleet?port=5", "PGPORT", "x"),
            ("sqlite:a.db", "PGSSLROOTCERT", "x"),
        ] {
            assert_eq!(check(url, name, value), Ok(()), "{url} {name}={value}");
        }
    }

    #[test]
    fn addresses_of_every_form_are_taken() {
        for text in [
            "postgres:///fleet?host=/var/run/postgresql&user=fleet",
            "postgres://%2Fvar%2Frun%2Fpostgresql/fleet",
            "postgres://fleet@%2Fvar%2Frun%2Fpostgresql/fleet",
            "postgresql://fleet:p%40%23%3Fss@db.example",
            "postgres://fleet@[::1]:5433/fleet?sslmode=disable",
            "postgres:///?options=-c%20synchronous_commit%3Doff&options[search_path]=fleet",
            "postgres://fleet%40server:pw@db.example:5432/fleet?connect_timeout=10",
        ] {
            let url: DatabaseUrl = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));

            let options: Result<sqlx::postgres::PgConnectOptions, _> = url.for_driver().parse();
            assert!(options.is_ok(), "{text}: {options:?}");
        }
    }

    #[test]
    fn driver_gets_an_ipv6_host_without_brackets_and_no_parameter_of_ours() {
        let url: DatabaseUrl = "postgres://fleet:p@[::1]:5433/fleet?connect_timeout=10&sslmode=disable"
            .parse()
            .unwrap();

        let options: sqlx::postgres::PgConnectOptions = url.for_driver().parse().unwrap();

        assert_eq!((options.get_host(), options.get_port()), ("::1", 5433));
        assert_eq!(url.connect_timeout(), Some(Duration::from_secs(10)));
        assert_eq!(
            url.for_driver(),
            "postgres://fleet:p@localhost:5433/fleet?sslmode=disable&host=::1"
        );
    }

    #[test]
    fn several_hosts_are_refused_in_words() {
        for text in ["postgres://u:hidden@a,b/d", "postgres://u:hidden@a:1,b:2/d"] {
            assert_eq!(
                text.parse::<DatabaseUrl>(),
                Err(InvalidDatabaseUrl::SeveralHosts),
                "{text}"
            );
        }
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
    fn sqlite_takes_no_parameter_but_mode_and_no_memory() {
        for (text, named) in [
            ("sqlite:a.db?mode=rwcX", "mode"),
            ("sqlite:a.db?mode=memory", "mode"),
            ("sqlite:a.db?mode", "mode"),
            ("sqlite:a.db?cache=hidden", "cache"),
            ("sqlite:a.db?mode=rwc&vfs=hidden", "vfs"),
            ("sqlite::memory:", "memory"),
            ("sqlite://:memory:", "memory"),
        ] {
            let error = text.parse::<DatabaseUrl>().unwrap_err().to_string();

            assert!(error.contains(named), "{text}: {error}");
            assert!(!error.contains("hidden") && !error.contains("rwcX"), "{text}: {error}");
        }
        let url: DatabaseUrl = "sqlite:a.db?mode=rwc".parse().unwrap();
        assert_eq!(url, "sqlite:a.db".parse().unwrap());
        assert!("sqlite:?mode=rwc".parse::<DatabaseUrl>().is_err());
    }

    #[test]
    fn file_of_a_parameter_that_cannot_be_read_is_an_error_that_names_the_parameter() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("root ca.pem");
        std::fs::write(&file, "x").unwrap();
        let there = file.display().to_string().replace(' ', "%20");
        let check = |query: &str, variable: Option<(&str, &str)>| {
            let url = format!("postgres://fleet@h/fleet?sslmode=verify-full{query}");
            let set = |name: &str| {
                variable
                    .filter(|(set, _)| *set == name)
                    .map(|(_, value)| value.to_owned())
            };
            url.parse::<DatabaseUrl>().unwrap().check_files(set)
        };

        for (query, name) in [
            ("&sslrootcert=/hidden/ca.pem", "sslrootcert"),
            ("&sslcert=/hidden/a.pem", "sslcert"),
            ("&ssl-key=/hidden/a.pem", "ssl-key"),
            ("&sslkey=", "sslkey"),
        ] {
            let error = check(query, None).unwrap_err().to_string();
            assert!(error.contains(name) && !error.contains("hidden"), "{error}");
        }
        let error = check("", Some(("PGSSLROOTCERT", "/hidden"))).unwrap_err().to_string();
        assert!(error.contains("PGSSLROOTCERT") && !error.contains("hidden"), "{error}");
        assert_eq!(
            check(&format!("&sslrootcert={there}"), Some(("PGSSLROOTCERT", "/hidden"))),
            Ok(())
        );
        assert_eq!(check("", None), Ok(()));
        assert_eq!(check("&sslcert=-----BEGIN%20CERTIFICATE-----", None), Ok(()));
    }

    #[test]
    fn other_addresses_are_refused_without_an_echo() {
        for text in ["", "mysql://u:hidden@h/d", "postgres://", "sqlite:", "postgres://h/d\n"] {
            let error = text.parse::<DatabaseUrl>().unwrap_err();

            assert!(!error.to_string().contains("hidden"), "{text}");
        }
    }
}
