//! The identity that a device claims. For each fact the first source that is present decides, even if it is malformed.

use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use percent_encoding::percent_decode_str;

use super::{Certified, IdentityNames, NamedDevice, single};
use crate::{
    id::{Credential, DeviceId, Label, SecretHash},
    refusal::Refusal,
};

/// Maximum length of a slot or resume token, in bytes. A longer one is ignored, like any invalid token.
const TOKEN_LEN_MAX: usize = 256;
const _: () = assert!(crate::resume::TOKEN_TEXT_LEN_MAX <= TOKEN_LEN_MAX);

const DOUBLED: &str = "an identity header is given twice";
const DOUBLED_QUERY: &str = "an identity parameter is given twice";
const OTHER_DEVICE: &str = "the device id is not the one that the client certificate names";
const AMBIGUOUS: &str = "the client certificate names several devices";
const BAD_DEVICE: &str = "the device id is not a UUID";
const BAD_EXTERNAL: &str = "the device id is not 1 to 64 bytes of printable ASCII";

pub(super) struct Identity {
    pub(super) device: DeviceId,
    pub(super) external_id: Option<Label>,
    pub(super) credential: Option<Credential>,
    pub(super) firmware: Option<Label>,
    pub(super) model: Option<Label>,
    pub(super) tenant: Option<Label>,
    pub(super) slot: Option<Box<str>>,
    pub(super) resume: Option<Box<str>>,
}

type Headers<'a> = &'a [(&'a str, &'a [u8])];

/// The parts of a request that may hold the identity.
#[derive(Clone, Copy)]
pub(super) struct Places<'a> {
    pub(super) headers: Headers<'a>,
    /// The device segment of the path, percent-encoded.
    pub(super) path: Option<&'a str>,
    pub(super) query: &'a str,
}

pub(super) fn parse(
    places: Places<'_>,
    names: &IdentityNames,
    certified: Option<Certified>,
) -> Result<Identity, Refusal> {
    let Places { headers, query, .. } = places;
    let device_header = single(headers, &names.device_header, DOUBLED)?;
    let authorization = Authorization::parse(single(headers, "Authorization", "Authorization is given twice")?);
    let label = |header, parameter, detail| label(headers, query, header, parameter, detail);
    let claimed = device(device_header, &authorization, places, names)?;
    let (named, credential) = match (certified, claimed) {
        (Some(Certified::Ambiguous), _) => return Err(Refusal::bad_request(AMBIGUOUS)),
        (Some(Certified::Device { device, .. }), Some(claimed)) if claimed.id != device => {
            return Err(Refusal::bad_request(OTHER_DEVICE));
        }
        (Some(Certified::Device { device, credential }), claimed) => {
            let named = claimed.unwrap_or(NamedDevice {
                id: device,
                external_id: None,
            });
            (named, Some(credential))
        }
        (None, Some(named)) => (
            named,
            authorization
                .secret()
                .map(|secret| Credential::Secret(SecretHash::of(secret))),
        ),
        (None, None) => return Err(Refusal::bad_request("the device id is missing")),
    };
    Ok(Identity {
        device: named.id,
        external_id: named.external_id,
        credential,
        firmware: label(
            &names.firmware_header,
            &names.firmware_query,
            "the firmware version is longer than 64 bytes or not printable ASCII",
        )?,
        model: label(
            &names.model_header,
            &names.model_query,
            "the model is longer than 64 bytes or not printable ASCII",
        )?,
        tenant: label(
            &names.tenant_header,
            &names.tenant_query,
            "the tenant is longer than 64 bytes or not printable ASCII",
        )?,
        slot: token(single(headers, &names.slot_header, DOUBLED)?),
        resume: token(single(headers, &names.resume_header, DOUBLED)?),
    })
}

/// Header, then Basic user name, then path, then query. `None` if the request has none of them.
fn device(
    header: Option<&[u8]>,
    authorization: &Authorization,
    places: Places<'_>,
    names: &IdentityNames,
) -> Result<Option<NamedDevice>, Refusal> {
    if let Some(value) = header {
        return device_from(value, names).map(Some);
    }
    match authorization {
        Authorization::Basic { user, .. } => return device_from(user, names).map(Some),
        Authorization::BrokenBasic => return Err(Refusal::bad_request("the Basic credentials are malformed")),
        Authorization::None | Authorization::Bearer(_) | Authorization::BasicWithoutUser { .. } => {}
    }
    if let Some(segment) = places.path {
        let decoded: Vec<u8> = percent_decode_str(segment).collect();
        return device_from(&decoded, names).map(Some);
    }
    parameter(places.query, &names.device_query)?
        .map(|value| device_from(&value, names))
        .transpose()
}

/// White space around an id is ignored, in every source.
fn device_from(bytes: &[u8], names: &IdentityNames) -> Result<NamedDevice, Refusal> {
    let problem = names.namespace.map_or(BAD_DEVICE, |_| BAD_EXTERNAL);
    std::str::from_utf8(bytes.trim_ascii())
        .ok()
        .and_then(|text| names.device(text))
        .ok_or(Refusal::bad_request(problem))
}

/// Header, then query. A value that is present but empty means "none".
fn label(
    headers: Headers<'_>,
    query: &str,
    header: &str,
    name: &str,
    detail: &'static str,
) -> Result<Option<Label>, Refusal> {
    let parse = |bytes: &[u8]| {
        std::str::from_utf8(bytes)
            .ok()
            .and_then(|text| Label::parse(text).ok())
            .ok_or(Refusal::bad_request(detail))
    };
    match single(headers, header, DOUBLED)? {
        Some(value) => parse(value),
        None => parameter(query, name)?.map_or(Ok(None), |value| parse(&value)),
    }
}

/// The percent-decoded value of a query parameter. `+` stays `+`, because versions contain it (`3.8.0+build`).
fn parameter(query: &str, name: &str) -> Result<Option<Vec<u8>>, Refusal> {
    let mut values = query.split('&').filter_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        percent_decode_str(key).eq(name.bytes()).then_some(value)
    });
    let first = values.next();
    match values.next() {
        Some(_) => Err(Refusal::bad_request(DOUBLED_QUERY)),
        None => Ok(first.map(|value| percent_decode_str(value).collect())),
    }
}

fn token(value: Option<&[u8]>) -> Option<Box<str>> {
    let value = value?.trim_ascii();
    let is_possible = (1..=TOKEN_LEN_MAX).contains(&value.len()) && value.iter().all(|byte| byte.is_ascii_graphic());
    is_possible
        .then(|| std::str::from_utf8(value).ok())
        .flatten()
        .map(Box::from)
}

/// The content of `Authorization`. Other schemes are ignored.
enum Authorization {
    None,
    Bearer(Vec<u8>),
    Basic {
        user: Vec<u8>,
        password: Vec<u8>,
    },
    /// `:SECRET`, from clients that send the id elsewhere.
    BasicWithoutUser {
        password: Vec<u8>,
    },
    /// Not base64, or without a colon.
    BrokenBasic,
}

/// Some firmware omits the padding.
const BASIC_BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

impl Authorization {
    fn parse(value: Option<&[u8]>) -> Self {
        let Some(value) = value.map(<[u8]>::trim_ascii) else {
            return Self::None;
        };
        let at = value.iter().position(|&byte| byte == b' ').unwrap_or(value.len());
        let (scheme, rest) = value.split_at(at);
        let rest = rest.trim_ascii();
        if scheme.eq_ignore_ascii_case(b"bearer") {
            return Self::Bearer(rest.to_vec());
        }
        if scheme.eq_ignore_ascii_case(b"basic") {
            return Self::parse_basic(rest);
        }
        Self::None
    }

    /// `user:password`. A colon in the password is part of it (RFC 7617 §2).
    fn parse_basic(base64: &[u8]) -> Self {
        let Ok(pair) = BASIC_BASE64.decode(base64) else {
            return Self::BrokenBasic;
        };
        let Some(colon) = pair.iter().position(|&byte| byte == b':') else {
            return Self::BrokenBasic;
        };
        let (user, password) = (&pair[..colon], &pair[colon + 1..]);
        if user.is_empty() {
            return Self::BasicWithoutUser {
                password: password.to_vec(),
            };
        }
        Self::Basic {
            user: user.to_vec(),
            password: password.to_vec(),
        }
    }

    /// The credential; an empty one is treated as missing.
    fn secret(&self) -> Option<&[u8]> {
        let secret = match self {
            Self::Bearer(secret) => secret,
            Self::Basic { password, .. } | Self::BasicWithoutUser { password } => password,
            Self::None | Self::BrokenBasic => return None,
        };
        (!secret.is_empty()).then_some(secret.as_slice())
    }
}
