//! Who the simulated devices are: the devices file, CSV as `seawall devices seed` writes it.

use std::{collections::HashSet, fmt, io, sync::Arc};

use seawall_proto::{
    hello::IdentityNames,
    id::{DeviceId, Label},
};

/// Shortest and longest secret, in bytes of visible ASCII.
const SECRET_LEN: std::ops::RangeInclusive<usize> = 16..=128;

/// One line of the devices file. `Debug` leaves the secret out.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    pub id: DeviceId,
    /// What it calls itself, where that is not a UUID: the gateway needs `identity.namespace` then.
    pub external_id: Option<Arc<str>>,
    pub secret: Box<str>,
    /// Claimed at each attempt.
    pub tenant: Option<Arc<str>>,
    /// Named at each attempt.
    pub model: Option<Arc<str>>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Which lines of the file the fleet has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lines {
    /// Devices passed over at the start. Default 0.
    pub offset: usize,
    /// Devices at most. Default all.
    pub limit: usize,
}

impl Default for Lines {
    fn default() -> Self {
        Self {
            offset: 0,
            limit: usize::MAX,
        }
    }
}

/// Reads devices. The first line is the header: `id` and `secret` in any order, `tenant` and `model` where there are any;
/// other columns are passed over. Reading stops behind the last line that is wanted.
///
/// # Errors
/// The line, counted from 1 with the header, and what is wrong with it.
pub fn read_devices(file: impl io::Read, lines: Lines) -> Result<Vec<Identity>, DevicesError> {
    let mut reader = csv::ReaderBuilder::new()
        .flexible(true)
        .trim(csv::Trim::All)
        .from_reader(file);
    let columns = Columns::find(reader.headers().map_err(DevicesError::unreadable)?)?;
    let mut texts = HashSet::new();
    let mut ids = HashSet::new();
    let mut devices = Vec::new();
    let mut record = csv::StringRecord::new();
    let mut seen = 0_usize;
    while devices.len() < lines.limit && reader.read_record(&mut record).map_err(DevicesError::unreadable)? {
        let line = record.position().map_or(0, csv::Position::line);
        seen += 1;
        if seen <= lines.offset {
            continue;
        }
        let device = columns
            .identity(&record, &mut texts)
            .map_err(|what| DevicesError::BadLine { line, what })?;
        if !ids.insert(device.id) {
            return Err(DevicesError::BadLine {
                line,
                what: BadLine::DoubledId(device.id),
            });
        }
        devices.push(device);
    }
    if devices.is_empty() {
        return Err(DevicesError::NoDevices);
    }
    Ok(devices)
}

struct Columns {
    id: usize,
    secret: usize,
    tenant: Option<usize>,
    model: Option<usize>,
}

impl Columns {
    fn find(header: &csv::StringRecord) -> Result<Self, DevicesError> {
        let column = |name: &str| {
            header
                .iter()
                .position(|column| column.trim_start_matches('\u{feff}') == name)
        };
        match (column("id"), column("secret")) {
            (Some(id), Some(secret)) => Ok(Self {
                id,
                secret,
                tenant: column("tenant"),
                model: column("model"),
            }),
            (None, _) => Err(DevicesError::NoColumn("id")),
            (Some(_), None) if column("secret_sha256").is_some() => Err(DevicesError::HashesOnly),
            (Some(_), None) => Err(DevicesError::NoColumn("secret")),
        }
    }

    fn identity(&self, record: &csv::StringRecord, texts: &mut HashSet<Arc<str>>) -> Result<Identity, BadLine> {
        let id = record.get(self.id).unwrap_or_default();
        let secret = record.get(self.secret).unwrap_or_default();
        if !SECRET_LEN.contains(&secret.len()) || !secret.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(BadLine::Secret);
        }
        let mut label = |column: Option<usize>, name| {
            let text = column.and_then(|column| record.get(column)).unwrap_or_default();
            let label = Label::parse(text).map_err(|_| BadLine::Label(name))?;
            Ok(label.map(|label| shared(&label, texts)))
        };
        // Which UUID the gateway makes of a name depends on its namespace. Here any namespace will do.
        let names = IdentityNames {
            namespace: Some(Default::default()),
            ..IdentityNames::default()
        };
        let named = names.device(id).ok_or(BadLine::Id)?;
        Ok(Identity {
            id: named.id,
            external_id: named.external_id.map(|name| Arc::clone(name.as_arc())),
            secret: secret.into(),
            tenant: label(self.tenant, "tenant")?,
            model: label(self.model, "model")?,
        })
    }
}

/// The same text once: fleets have few tenants and models.
fn shared(text: &str, texts: &mut HashSet<Arc<str>>) -> Arc<str> {
    if let Some(known) = texts.get(text) {
        return Arc::clone(known);
    }
    let new: Arc<str> = text.into();
    texts.insert(Arc::clone(&new));
    new
}

/// The devices file is invalid.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    #[error("{0}")]
    Unreadable(String),
    #[error("the first line is the header, and names no column `{0}`")]
    NoColumn(&'static str),
    #[error("the file has `secret_sha256` but no `secret`: a device can't connect with a hash")]
    HashesOnly,
    #[error("line {line}: {what}")]
    BadLine { line: u64, what: BadLine },
    #[error("no devices (after --offset)")]
    NoDevices,
}

impl DevicesError {
    #[expect(clippy::needless_pass_by_value, reason = "`map_err` passes by value")]
    fn unreadable(error: csv::Error) -> Self {
        let what = match error.kind() {
            csv::ErrorKind::Io(error) => error.to_string(),
            csv::ErrorKind::Utf8 { .. } => "not UTF-8".into(),
            // The others come from options that this reader does not use. Their texts may repeat a field.
            csv::ErrorKind::UnequalLengths { .. }
            | csv::ErrorKind::Seek
            | csv::ErrorKind::Serialize(_)
            | csv::ErrorKind::Deserialize { .. }
            | _ => "malformed".into(),
        };
        Self::Unreadable(match error.position() {
            Some(position) => format!("line {}: {what}", position.line()),
            None => what,
        })
    }
}

/// Fault in a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadLine {
    #[error("the id is neither a UUID nor 1 to 64 bytes of printable ASCII")]
    Id,
    #[error("the id {0} has come before")]
    DoubledId(DeviceId),
    #[error("the secret is not 16 to 128 bytes of visible ASCII")]
    Secret,
    #[error("the {0} is not at most 64 bytes of printable ASCII")]
    Label(&'static str),
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "9b0c2e4a-11d2-7f00-8000-0000000000aa";
    const B: &str = "9B0C2E4A11D27F0080000000000000BB";
    const SECRET: &str = "0123456789abcdef";

    fn read(text: &str) -> Result<Vec<Identity>, DevicesError> {
        read_devices(text.as_bytes(), Lines::default())
    }

    #[test]
    fn columns_may_stand_in_any_order_with_others_between() {
        let devices = read(&format!("model,secret,note,id\nm1,{SECRET},x,{A}\n,{SECRET}, ,{B}\n")).unwrap();

        assert_eq!(devices.len(), 2);
        assert_eq!(devices[0].model.as_deref(), Some("m1"));
        assert_eq!(
            (devices[0].tenant.as_deref(), devices[1].model.as_deref()),
            (None, None)
        );
    }

    #[test]
    fn id_that_is_not_a_uuid_is_kept_as_it_is_written() {
        let devices = read(&format!("id,secret\nCP 01,{SECRET}\n{A},{SECRET}\n")).unwrap();

        assert_eq!(devices[0].external_id.as_deref(), Some("CP 01"));
        assert_eq!((devices[1].id, &devices[1].external_id), (A.parse().unwrap(), &None));
    }

    #[test]
    fn offset_and_limit_pick_lines() {
        let text = format!("id,secret\n{A},{SECRET}\n{B},{SECRET}\nbad,line\n");

        let devices = read_devices(text.as_bytes(), Lines { offset: 1, limit: 1 }).unwrap();

        assert_eq!(devices[0].id, B.parse().unwrap());
    }

    #[test]
    fn bad_lines_are_named_by_number() {
        for (line, words) in [
            (format!("{A},short"), "line 3: the secret"),
            (format!("{A},0123456789abcde\u{e9}"), "line 3: the secret"),
            (A.to_owned(), "line 3: the secret"),
            (format!("\u{e9},{SECRET}"), "line 3: the id is neither"),
            (format!(",{SECRET}"), "line 3: the id is neither"),
            (
                format!("{B},{SECRET}"),
                "line 3: the id 9b0c2e4a-11d2-7f00-8000-0000000000bb has come before",
            ),
            (format!("{A},{SECRET},{}", "t".repeat(65)), "line 3: the tenant"),
        ] {
            let message = read(&format!("id,secret,tenant\n{B},{SECRET},t\n{line}\n"))
                .unwrap_err()
                .to_string();

            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn files_of_no_use_say_why() {
        for (text, words) in [
            ("", "column `id`"),
            ("id,secret\n", "no devices"),
            ("id,secret_sha256\n", "hash"),
            ("id,tenant\n", "column `secret`"),
        ] {
            let message = read(text).unwrap_err().to_string();

            assert!(message.contains(words), "{message}");
        }
        let bytes = [b"id,secret\n".as_slice(), &[0xff, b',', b'x', b'\n']].concat();
        let message = read_devices(bytes.as_slice(), Lines::default())
            .unwrap_err()
            .to_string();
        assert_eq!(message, "line 2: not UTF-8");
    }
}
