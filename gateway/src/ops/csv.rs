//! Lines of a device import, cut out of a stream of bytes as they arrive. Start with [`DeviceLines`].
//!
//! No line is ever held whole beyond [`RECORD_BYTES_MAX`], whatever the file says: an unclosed quote is one bad line, not a full memory.

use std::ops::Range;

use csv_core::{ReadRecordResult, Reader};
use seawall_proto::id::{InvalidLabel, Label, SecretHash};

use crate::store::{ImportLine, ImportRow};

/// Greatest line, in bytes: the longest values that are allowed take a tenth of it. A longer one is a bad line.
const RECORD_BYTES_MAX: usize = 4_096;
/// Most fields of a line.
const FIELDS_MAX: usize = 16;
/// What some editors put before the first character of a file.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();
/// Lengths of a device's secret, in bytes (contract section 7).
const SECRET_LEN: std::ops::RangeInclusive<usize> = 16..=128;

/// Reads the file piece by piece.
pub struct DeviceLines {
    reader: Reader,
    record: Box<[u8; RECORD_BYTES_MAX]>,
    record_len: usize,
    ends: [usize; FIELDS_MAX],
    ends_len: usize,
    /// The record was longer than there is room for.
    is_too_long: bool,
    newlines: u64,
    columns: Option<Columns>,
}

/// Where each column is.
#[derive(Debug, Default, PartialEq, Eq)]
struct Columns {
    count: usize,
    id: usize,
    secret: Option<usize>,
    secret_sha256: Option<usize>,
    tenant: Option<usize>,
    model: Option<usize>,
}

/// The header is not one of a device import.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line 1, the header: {0}")]
pub struct BadHeader(String);

impl Default for DeviceLines {
    fn default() -> Self {
        Self {
            reader: Reader::new(),
            record: Box::new([0; RECORD_BYTES_MAX]),
            record_len: 0,
            ends: [0; FIELDS_MAX],
            ends_len: 0,
            is_too_long: false,
            newlines: 0,
            columns: None,
        }
    }
}

impl DeviceLines {
    /// Takes the next piece of the file and appends the lines that it completes.
    ///
    /// # Errors
    /// The header is wrong; nothing that follows could be understood.
    pub fn feed(&mut self, mut piece: &[u8], lines: &mut Vec<ImportLine>) -> Result<(), BadHeader> {
        while !piece.is_empty() {
            piece = self.step(piece, lines)?;
        }
        Ok(())
    }

    /// The file is over: appends the line that had no end, if there is one.
    ///
    /// # Errors
    /// There was no header, or a wrong one.
    pub fn finish(mut self, lines: &mut Vec<ImportLine>) -> Result<(), BadHeader> {
        // Reading nothing means the end: one call for a last line, one that finds none.
        self.step(&[], lines)?;
        match self.columns {
            Some(_) => Ok(()),
            None => Err(BadHeader("the file is empty".into())),
        }
    }

    /// Reads up to the end of a record, of the piece, or of the room for a record. Returns the rest of the piece.
    fn step<'a>(&mut self, piece: &'a [u8], lines: &mut Vec<ImportLine>) -> Result<&'a [u8], BadHeader> {
        let (result, read, written, ended) = self.reader.read_record(
            piece,
            &mut self.record[self.record_len..],
            &mut self.ends[self.ends_len..],
        );
        let (consumed, rest) = piece.split_at(read);
        self.newlines += consumed.iter().filter(|byte| **byte == b'\n').count() as u64;
        self.record_len += written;
        self.ends_len += ended;
        match result {
            ReadRecordResult::Record => {
                // Of "\r\n", the record ends at the first.
                let number = self.newlines + u64::from(consumed.last() != Some(&b'\n'));
                self.take_record(number, lines)?;
                self.clear();
            }
            ReadRecordResult::OutputFull | ReadRecordResult::OutputEndsFull => {
                self.clear();
                self.is_too_long = true;
            }
            ReadRecordResult::InputEmpty | ReadRecordResult::End => {}
        }
        Ok(rest)
    }

    fn take_record(&mut self, number: u64, lines: &mut Vec<ImportLine>) -> Result<(), BadHeader> {
        let Some(columns) = &self.columns else {
            if self.is_too_long {
                return Err(BadHeader("it is too long".into()));
            }
            self.columns = Some(Columns::read(&self.fields())?);
            return Ok(());
        };
        let row = if self.is_too_long {
            Err(format!(
                "it is longer than {RECORD_BYTES_MAX} bytes, or a quote is not closed"
            ))
        } else {
            columns.row(&self.fields())
        };
        lines.push(ImportLine { number, row });
        Ok(())
    }

    /// The fields of the record, without spaces around them.
    fn fields(&self) -> Vec<&[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let fields = starts.zip(&self.ends[..self.ends_len]);
        fields
            .map(|(start, end)| self.record.get(Range { start, end: *end }).unwrap_or_default())
            .map(<[u8]>::trim_ascii)
            .collect()
    }

    fn clear(&mut self) {
        self.record_len = 0;
        self.ends_len = 0;
        self.is_too_long = false;
    }
}

impl Columns {
    fn read(header: &[&[u8]]) -> Result<Self, BadHeader> {
        let mut columns = Self {
            count: header.len(),
            ..Self::default()
        };
        let mut id = None;
        for (index, name) in header.iter().enumerate() {
            // The reader takes a byte order mark away only where it comes in one piece.
            let name = name.strip_prefix(BYTE_ORDER_MARK).unwrap_or(name);
            let column = match name {
                b"id" => &mut id,
                b"secret" => &mut columns.secret,
                b"secret_sha256" => &mut columns.secret_sha256,
                b"tenant" => &mut columns.tenant,
                b"model" => &mut columns.model,
                _ => {
                    return Err(BadHeader(format!(
                        "column {} is none of id, secret, secret_sha256, tenant, model",
                        index + 1
                    )));
                }
            };
            if column.replace(index).is_some() {
                return Err(BadHeader(format!("column {} is there twice", index + 1)));
            }
        }
        columns.id = id.ok_or_else(|| BadHeader("the column id is missing".into()))?;
        if columns.secret.is_none() && columns.secret_sha256.is_none() {
            return Err(BadHeader("a column secret or secret_sha256 is missing".into()));
        }
        Ok(columns)
    }

    /// The row, or what is wrong with it, in words that repeat nothing of it.
    fn row(&self, fields: &[&[u8]]) -> Result<ImportRow, String> {
        if fields.len() != self.count {
            return Err(format!("it has {} fields, the header has {}", fields.len(), self.count));
        }
        let field = |column: Option<usize>| {
            column
                .and_then(|index| fields.get(index).copied())
                .filter(|field| !field.is_empty())
        };
        let id = field(Some(self.id)).ok_or("id is missing")?;
        let id = std::str::from_utf8(id)
            .ok()
            .and_then(|text| text.parse().ok())
            .ok_or("id is no UUID")?;
        let secret = match (field(self.secret), field(self.secret_sha256)) {
            (Some(secret), None) => hash_of(secret)?,
            (None, Some(digits)) => hash_from(digits).ok_or("secret_sha256 is not 64 hexadecimal digits")?,
            (Some(_), Some(_)) => return Err("it has both a secret and a secret_sha256".into()),
            (None, None) => return Err("it has neither a secret nor a secret_sha256".into()),
        };
        Ok(ImportRow {
            id,
            secret,
            tenant: label("tenant", field(self.tenant))?,
            model: label("model", field(self.model))?,
        })
    }
}

fn hash_of(secret: &[u8]) -> Result<SecretHash, String> {
    if SECRET_LEN.contains(&secret.len()) && secret.iter().all(u8::is_ascii_graphic) {
        Ok(SecretHash::of(secret))
    } else {
        Err(format!(
            "secret is not {} to {} bytes of visible ASCII",
            SECRET_LEN.start(),
            SECRET_LEN.end()
        ))
    }
}

fn hash_from(digits: &[u8]) -> Option<SecretHash> {
    let mut bytes = [0; 32];
    if digits.len() != 2 * bytes.len() {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |ascii: u8| {
            char::from(ascii)
                .to_digit(16)
                .and_then(|digit| u8::try_from(digit).ok())
        };
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(SecretHash::from_bytes(bytes))
}

fn label(name: &str, field: Option<&[u8]>) -> Result<Option<Label>, String> {
    let Some(field) = field else { return Ok(None) };
    std::str::from_utf8(field)
        .map_err(|_| InvalidLabel)
        .and_then(Label::parse)
        .map_err(|problem| format!("{name}: {problem}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "9b0c2e4a-11d2-7f00-8000-0000000000aa";
    const SECRET: &str = "0123456789abcdef";

    /// Read in pieces of every length, which must not matter.
    fn read(file: &[u8]) -> Result<Vec<ImportLine>, BadHeader> {
        let in_pieces = |len: usize| {
            let (mut reader, mut lines) = (DeviceLines::default(), Vec::new());
            for piece in file.chunks(len) {
                reader.feed(piece, &mut lines)?;
            }
            reader.finish(&mut lines)?;
            Ok(lines)
        };
        let whole = in_pieces(file.len().max(1));
        for len in [1, 2, 7] {
            assert_eq!(
                format!("{:?}", in_pieces(len)),
                format!("{whole:?}"),
                "in pieces of {len}"
            );
        }
        whole
    }

    fn bad(file: &str) -> Vec<(u64, String)> {
        let lines = read(file.as_bytes()).unwrap();
        lines
            .into_iter()
            .filter_map(|line| Some((line.number, line.row.err()?)))
            .collect()
    }

    #[test]
    fn good_lines_are_read_whatever_their_ends_quotes_and_columns() {
        let file =
            format!("\u{feff}model, id,secret,tenant\r\nm1,{ID},{SECRET},\r\n\r\n\"a b\",\"{ID}\",\"{SECRET}\",t");

        let lines = read(file.as_bytes()).unwrap();

        let rows: Vec<_> = lines
            .iter()
            .map(|line| (line.number, line.row.as_ref().unwrap()))
            .collect();
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0].0, 2);
        assert_eq!(rows[1].0, 4);
        assert_eq!(rows[0].1.id.to_string(), ID);
        assert_eq!(rows[0].1.secret, SecretHash::of(SECRET.as_bytes()));
        assert_eq!((&rows[0].1.tenant, rows[0].1.model.as_deref()), (&None, Some("m1")));
        assert_eq!(rows[1].1.model.as_deref(), Some("a b"));
    }

    #[test]
    fn hashes_are_taken_in_either_letter_case() {
        let hash = "2C26B46B68FFC68FF99B453C1D30413413422D706483BFA0F98A5E886266E7ae";

        let lines = read(format!("id,secret_sha256\n{ID},{hash}\n").as_bytes()).unwrap();

        assert_eq!(lines[0].row.as_ref().unwrap().secret, SecretHash::of(b"foo"));
    }

    #[test]
    fn bad_lines_are_named_by_number_and_never_repeated() {
        let file = format!(
            "id,secret,tenant\n{ID},{SECRET},t\nnope,{SECRET},t\n{ID},short,t\n{ID},{SECRET}\n{ID},{SECRET},\u{e9}\n{ID},,t\n{ID},0123456789 abcdef,t"
        );

        let bad = bad(&file);

        let numbers: Vec<_> = bad.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, [3, 4, 5, 6, 7, 8]);
        assert!(
            bad.iter()
                .all(|(_, reason)| !reason.contains("short") && !reason.contains(SECRET))
        );
    }

    #[test]
    fn an_unclosed_quote_is_one_bad_line_and_little_memory() {
        let file = format!("id,secret\n{ID},\"{}", "x\n".repeat(100_000));

        let bad = bad(&file);

        assert_eq!(bad.len(), 1);
        assert!(bad[0].1.contains("quote"), "{bad:?}");
    }

    #[test]
    fn headers_that_say_something_else_are_refused() {
        for header in [
            "",
            "\n\n",
            "id\n",
            "secret,tenant\n",
            "id,secret,id\n",
            "id,secret,colour\n",
            "id;secret\n",
            "Id,Secret\n",
        ] {
            assert!(read(header.as_bytes()).is_err(), "{header:?}");
        }
    }
}
