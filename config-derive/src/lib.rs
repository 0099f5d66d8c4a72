//! `#[derive(ResumeKeys)]` requires every key of a configuration section to say what a changed
//! value means for a run that resumes:
//!
//! - `#[on_resume(free)]`: any value may be given; results do not depend on it.
//! - `#[on_resume(reported)]`: the change is printed and recorded.
//! - `#[on_resume(refused)]`: the saved weights would represent another function.
//! - `#[on_resume(section)]`: the keys of the field's type decide.
//!
//! A field without one of these does not compile. The trait is `trainer::config::ResumeKeys`.

use proc_macro::TokenStream;
use proc_macro2::TokenStream as Tokens;
use quote::quote;
use syn::{Attribute, Data, DeriveInput, Error, Field, Fields, Ident, Result, parse_macro_input};

const MISSING: &str = "say what a change of this key means on a resume: #[on_resume(free)], \
    (reported), (refused) or (section)";

/// Implements `ResumeKeys` for a struct whose fields all have an `#[on_resume(..)]` attribute.
#[proc_macro_derive(ResumeKeys, attributes(on_resume))]
pub fn derive_resume_keys(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    let tokens = expand(&input).unwrap_or_else(Error::into_compile_error);
    tokens.into()
}

fn expand(input: &DeriveInput) -> Result<Tokens> {
    let name = &input.ident;
    let Data::Struct(data) = &input.data else {
        return Err(Error::new_spanned(name, "only structs have keys"));
    };
    let Fields::Named(fields) = &data.fields else {
        return Err(Error::new_spanned(name, "the fields need names"));
    };
    let mut keys = Vec::new();
    for field in &fields.named {
        keys.push(key(field)?);
    }
    Ok(quote! {
        const _: () = {
            #[allow(unused_imports)]
            use crate::config::{ResumeEffect, ResumeKey, ResumeKeys, ResumeRule};
            impl ResumeKeys for #name {
                const KEYS: &'static [ResumeKey] = &[#(#keys),*];
            }
        };
    })
}

fn key(field: &Field) -> Result<Tokens> {
    let name = field.ident.as_ref().map(Ident::to_string);
    let field_type = &field.ty;
    let is_wanted = |attribute: &&Attribute| attribute.path().is_ident("on_resume");
    let Some(attribute) = field.attrs.iter().find(is_wanted) else {
        return Err(Error::new_spanned(field, MISSING));
    };
    let class: Ident = attribute.parse_args()?;
    let word = class.to_string();
    let effect = match word.as_str() {
        "free" => quote!(Effect(ResumeEffect::Free)),
        "reported" => quote!(Effect(ResumeEffect::Reported)),
        "refused" => quote!(Effect(ResumeEffect::Refused)),
        "section" => quote!(Section(<#field_type as ResumeKeys>::KEYS)),
        _ => {
            let known = "use free, reported, refused or section";
            return Err(Error::new_spanned(class, known));
        }
    };
    Ok(quote! {
        ResumeKey {
            name: #name,
            rule: ResumeRule::#effect,
        }
    })
}
