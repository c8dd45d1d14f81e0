//! Certificate checks of `seawall doctor`: whether key and chain match, and when they expire.

use rustls::{crypto::ring, pki_types::CertificateDer};
use seawall_proto::time::WallTime;
use x509_parser::{
    certificate::X509Certificate, prelude::FromDer, public_key::PublicKey, revocation_list::CertificateRevocationList,
};

use super::{
    EXPIRY_NOTICE, Files, TlsError,
    files::{Contents, wall},
};

/// A finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    Fine(String),
    /// It works, but an operator should know.
    Notice(String),
    Wrong(String),
}

/// Checks the files of one listener.
///
/// # Errors
/// A gateway would not start with them.
pub fn inspect(files: &Files, now: WallTime) -> Result<Vec<Note>, TlsError> {
    let contents = files.read()?;
    let ticketer = ring::Ticketer::new().map_err(|error| TlsError::System(error.to_string()))?;
    contents.load(&ticketer)?;
    let (setting, path) = (files.certificate.setting, files.certificate.path.display());
    let mut notes = vec![Note::Fine(format!(
        "{setting}: {path} can be used, and {} is its key",
        files.key.path.display()
    ))];
    let chain = contents.chain()?;
    let parsed: Vec<X509Certificate<'_>> = chain.iter().filter_map(parse).collect();
    for (number, certificate) in (1..).zip(&parsed) {
        notes.extend(validity(
            &format!("{setting}: certificate {number} of {path}"),
            certificate,
            now,
        ));
    }
    for (number, pair) in (1..).zip(parsed.windows(2)) {
        let is_issued =
            pair[0].issuer() == pair[1].subject() && pair[0].verify_signature(Some(pair[1].public_key())).is_ok();
        if !is_issued {
            notes.push(Note::Wrong(format!(
                "{setting}: certificate {number} of {path} is not issued by certificate {}: devices can't follow the chain",
                number + 1
            )));
        }
    }
    if let Some(leaf) = parsed.first() {
        notes.extend(leaf_notes(setting, leaf, parsed.len()));
    }
    notes.extend(list_notes(&contents, files, now)?);
    Ok(notes)
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Option<X509Certificate<'a>> {
    // `load` has rejected what cannot be parsed.
    X509Certificate::from_der(der).ok().map(|(_, certificate)| certificate)
}

fn validity(what: &str, certificate: &X509Certificate<'_>, now: WallTime) -> Option<Note> {
    let end = wall(certificate.validity().not_after);
    let when = certificate.validity().not_after;
    if wall(certificate.validity().not_before) > now {
        return Some(Note::Wrong(format!(
            "{what} is not valid before {}: devices reject it",
            certificate.validity().not_before
        )));
    }
    if end <= now {
        return Some(Note::Wrong(format!("{what} expired on {when}: devices reject it")));
    }
    if end < now + EXPIRY_NOTICE {
        return Some(Note::Notice(format!("{what} expires on {when}: renew it")));
    }
    Some(Note::Fine(format!("{what} is valid until {when}")))
}

fn leaf_notes(setting: &str, leaf: &X509Certificate<'_>, chain_len: usize) -> Vec<Note> {
    let mut notes = Vec::new();
    if leaf.subject_alternative_name().ok().flatten().is_none() {
        notes.push(Note::Wrong(format!(
            "{setting}: the certificate has no subject alternative name, and clients check no other"
        )));
    }
    if leaf.is_ca() {
        notes.push(Note::Notice(format!(
            "{setting}: the first certificate is a CA: the gateway's own must come first"
        )));
    }
    if matches!(leaf.public_key().parsed(), Ok(PublicKey::RSA(_))) {
        notes.push(Note::Notice(format!(
            "{setting}: an RSA key costs several times the CPU of an ECDSA P-256 key in each handshake"
        )));
    }
    if leaf.issuer() == leaf.subject() {
        notes.push(Note::Notice(format!(
            "{setting}: the certificate is self-signed: devices must trust it explicitly"
        )));
    } else if chain_len == 1 {
        notes.push(Note::Notice(format!(
            "{setting}: the file holds one certificate: right only where devices know its issuer ({}) itself",
            leaf.issuer()
        )));
    }
    notes
}

/// Coverage of the revocation lists, and whether they are out of date.
fn list_notes(contents: &Contents<'_>, files: &Files, now: WallTime) -> Result<Vec<Note>, TlsError> {
    let Some(crl) = files.clients.as_ref().and_then(|clients| clients.crl.as_ref()) else {
        return Ok(Vec::new());
    };
    let (setting, path) = (crl.setting, crl.path.display());
    let (authorities, lists) = (contents.authorities()?, contents.lists()?);
    let lists: Vec<CertificateRevocationList<'_>> = lists
        .iter()
        .filter_map(|list| CertificateRevocationList::from_der(list).ok().map(|(_, list)| list))
        .collect();
    let mut notes: Vec<_> = lists
        .iter()
        .map(|list| {
            let (issuer, revoked) = (list.issuer(), list.iter_revoked_certificates().count());
            match list.next_update() {
                Some(next) if wall(next) < now => Note::Notice(format!(
                    "{setting}: {path}: the list of {issuer} should have been replaced by {next}; it stays in use"
                )),
                Some(next) => Note::Fine(format!(
                    "{setting}: {path}: the list of {issuer} revokes {revoked}, and is current until {next}"
                )),
                None => Note::Fine(format!("{setting}: {path}: the list of {issuer} revokes {revoked}")),
            }
        })
        .collect();
    for authority in authorities.iter().filter_map(parse) {
        if !lists.iter().any(|list| list.issuer() == authority.subject()) {
            notes.push(Note::Notice(format!(
                "{setting}: {path} has no list of {}: device certificates that it issues are refused, and whether it has revoked an authority below it is not looked at",
                authority.subject()
            )));
        }
    }
    Ok(notes)
}
