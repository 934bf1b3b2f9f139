package selection

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() { caddy.RegisterModule(new(Sticky)) }

const (
	defaultCookie     = "lb"
	defaultCookiePath = "/"

	sameSiteLax    = "lax"
	sameSiteStrict = "strict"
	sameSiteNone   = "none"
)

// Sticky sends all calls of a client to the endpoint that its first call went to. The answer gives the client a token, in a
// cookie or in metadata, and the client shows it in its next calls. The token is a keyed digest: it does not tell the
// endpoint's address, and a client cannot make one up.
//
// An endpoint that drains keeps its clients until it is gone. If the endpoint is gone, cannot be used, or has been tried in
// vain, the call goes where the fallback says, and the client gets a new token.
type Sticky struct {
	// The cookie that carries the token. Default: `lb`, unless `metadata` is given.
	Cookie string `json:"cookie,omitempty"`

	// The metadata key that carries the token, for clients that keep no cookies: they find it in the answer's leading
	// metadata and send it with further calls. Only one of `cookie` and `metadata` may be given.
	Metadata string `json:"metadata,omitempty"`

	// What tokens are made with. All proxies that a client may come to need the same one; a placeholder such as
	// `{env.STICKY_SECRET}` or `{file./run/secrets/sticky}` is resolved when the configuration is loaded. Default: random,
	// until the process ends.
	Secret string `json:"secret,omitempty"`

	// How long a token is good for. A client that goes on calling gets a new one in time. Default: `0`; it lasts as long
	// as the client keeps it, which for a cookie is until the browser is closed.
	MaxAge caddy.Duration `json:"max_age,omitempty"`

	// The cookie's path. Default: `/`.
	Path string `json:"path,omitempty"`

	// Whether other sites may cause the client to send the cookie: `lax`, `strict` or `none`. Default: `none` if the
	// client is connected by TLS, so that web applications of other origins can be clients; else `lax`.
	SameSite string `json:"same_site,omitempty"`

	// Let the client send the cookie by TLS only even though it is not connected to this proxy by TLS, since something in
	// front terminates it. Default: false; only cookies that are given to clients by TLS are so marked.
	Secure bool `json:"secure,omitempty"`

	// The policy for calls without a token that leads anywhere. Default: `least_request`.
	FallbackRaw json.RawMessage `json:"fallback,omitempty" caddy:"namespace=http.grpc_proxy.selection_policies inline_key=policy"`

	nested
	minter *minter
}

// CaddyModule returns the Caddy module information.
func (*Sticky) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: namespace + "sticky", New: func() caddy.Module { return new(Sticky) }}
}

// UnmarshalCaddyfile reads the policy from the Caddyfile:
//
//	lb_policy sticky {
//	    cookie    <name>
//	    metadata  <key>
//	    secret    <secret>
//	    max_age   <duration>
//	    path      <path>
//	    same_site lax|strict|none
//	    secure
//	    fallback  <policy> ...
//	}
func (p *Sticky) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // The policy's name.
	if d.NextArg() {
		return d.Errf("sticky: unexpected argument %q; options go into a block", d.Val())
	}
	return options{
		"cookie":    textOption(&p.Cookie),
		"metadata":  textOption(&p.Metadata),
		"secret":    textOption(&p.Secret),
		"max_age":   durationOption(&p.MaxAge),
		"path":      textOption(&p.Path),
		"same_site": textOption(&p.SameSite),
		"secure":    flagOption(&p.Secure),
		"fallback":  policyOption(&p.FallbackRaw),
	}.parse(d, "sticky")
}

// Provision implements caddy.Provisioner.
func (p *Sticky) Provision(ctx caddy.Context) error {
	p.FallbackRaw = orLeastRequest(p.FallbackRaw)
	if err := p.load(ctx, p, "FallbackRaw"); err != nil {
		return fmt.Errorf("fallback: %w", err)
	}
	if p.Cookie == "" && p.Metadata == "" {
		p.Cookie = defaultCookie
	}
	if p.Path == "" {
		p.Path = defaultCookiePath
	}
	secret, err := resolveSecret(p.Secret)
	if err != nil {
		return err
	}
	p.minter = newMinter(secret)
	return nil
}

// resolveSecret fills in placeholders. An empty result would make tokens that anybody can make.
func resolveSecret(configured string) ([]byte, error) {
	if configured == "" {
		return processSecret(), nil
	}
	secret := caddy.NewReplacer().ReplaceAll(configured, "")
	if secret == "" {
		return nil, fmt.Errorf("secret: %s is empty; give it a value, or leave the option out for a random secret", configured)
	}
	return []byte(secret), nil
}

// Validate implements caddy.Validator.
func (p *Sticky) Validate() error {
	if binds(p.child) {
		return errors.New("fallback: a sticky policy within a sticky policy would give each client two tokens; write the one that chooses for new clients, round_robin, say")
	}
	switch {
	case p.MaxAge < 0:
		return fmt.Errorf("max_age: %v is negative", time.Duration(p.MaxAge))
	case p.MaxAge > 0 && time.Duration(p.MaxAge) < time.Second:
		return fmt.Errorf("max_age: %v is below one second, which is as fine as cookies are", time.Duration(p.MaxAge))
	}
	if p.Metadata != "" {
		switch {
		case p.Cookie != "":
			return fmt.Errorf("cookie, metadata: both %s and %s are to carry the token; choose one", p.Cookie, p.Metadata)
		case p.SameSite != "" || p.Secure || p.Path != defaultCookiePath:
			return errors.New("metadata: path, same_site and secure are for cookies")
		case strings.ToLower(p.Metadata) != p.Metadata:
			return fmt.Errorf("metadata: keys are in lower case; write %s", strings.ToLower(p.Metadata))
		case strings.HasPrefix(p.Metadata, "grpc-"):
			return fmt.Errorf("metadata: %s begins with grpc-, which is gRPC's own", p.Metadata)
		}
		if err := checkMetadataKey(p.Metadata); err != nil {
			return fmt.Errorf("metadata: %w", err)
		}
		return nil
	}
	if p.SameSite != "" && p.SameSite != sameSiteLax && p.SameSite != sameSiteStrict && p.SameSite != sameSiteNone {
		return fmt.Errorf("same_site: %q is none of lax, strict, none", p.SameSite)
	}
	if err := (&http.Cookie{Name: p.Cookie, Path: p.Path, Value: "x"}).Valid(); err != nil { //nolint:gosec // a check of name and path
		return fmt.Errorf("cookie: name %q, path %q: %w", p.Cookie, p.Path, err)
	}
	return nil
}

// BindsClients implements [Binding].
func (*Sticky) BindsClients() bool { return true }

// WithPriorities implements [Prioritized]: a client stays with its endpoint whatever level that has. Levels are for choosing a new one.
func (p *Sticky) WithPriorities() Policy {
	q := *p
	q.child = WithPriorities(p.child)
	return &q
}

// Build implements [Policy].
func (p *Sticky) Build(s *upstream.Snapshot) Picker {
	all := slices.Concat(s.Endpoints, s.Draining)
	k := &sticky{
		policy:     p,
		candidates: newCandidates(&upstream.Snapshot{Endpoints: all}),
		places:     newPlaces(all),
		tokens:     p.minter.mint(all),
		fallback:   p.child.Build(s),
		bonds:      make([]Pick, len(all)),
	}
	k.audience.Annotator = k
	others := interestsOf(k.fallback)
	for i := range all {
		k.bonds[i] = others.in(all[i].Index)
		k.bonds[i].Audience = k.audience.And(k.bonds[i].Audience)
	}
	return k
}

// sticky knows the endpoints that take new calls, and after them those that drain.
type sticky struct {
	candidates
	policy   *Sticky
	places   places
	tokens   *tokens
	fallback Picker
	bonds    []Pick // by place
	audience Audience
}

// Pick implements [Picker]. No other endpoint will do, for a new client neither: it will stay there.
func (p *sticky) Pick(in PickInfo) (Pick, bool) {
	if place, _, ok := p.bound(in.Call); ok && p.keeps(place, &in) {
		return p.bonds[place], true
	}
	pick, ok := p.fallback.Pick(in)
	pick.Audience = p.audience.And(pick.Audience)
	pick.AnyWillDo = false
	return pick, ok
}

// Interests implements [Interested]: whoever has picked the endpoint, the client stays there.
func (p *sticky) Interests(f func(Pick)) {
	for _, pick := range p.bonds {
		f(pick)
	}
}

// keeps tells whether the client may stay with its endpoint: unlike others it may while that drains.
func (p *sticky) keeps(place int, in *PickInfo) bool {
	s := p.states[place]
	stays := in.usable(s) || s.Has(upstream.Draining) && s.UsableExcept(upstream.Draining|in.Disregard)
	return stays && !slices.Contains(in.Tried, p.index(place))
}

// bound returns the place of the endpoint that the call's token names, and how long the token is good for.
func (p *sticky) bound(c *call.Call) (place int, left time.Duration, ok bool) {
	text := p.policy.tokenOf(c)
	if text == "" {
		return 0, 0, false
	}
	return p.tokens.find(text, p.policy.MaxAge > 0)
}

// Annotate implements [Annotator]. The client gets a token unless it has one for this endpoint that has most of its time
// before it.
func (p *sticky) Annotate(c *call.Call, pick Pick, add func(name, value string)) {
	place, ok := p.places.of(pick.Index)
	if !ok {
		return
	}
	maxAge := time.Duration(p.policy.MaxAge)
	if at, left, ok := p.bound(c); ok && at == place && (maxAge == 0 || left > maxAge/2) {
		return
	}
	token := p.tokens.text(place, maxAge)
	if p.policy.Metadata != "" {
		add(p.policy.Metadata, token)
		return
	}
	add("set-cookie", p.policy.cookie(token, c.TLS != nil))
}

// tokenOf is what the call has for a token.
func (p *Sticky) tokenOf(c *call.Call) string {
	switch {
	case c == nil || c.Metadata == nil:
		return ""
	case p.Metadata == "":
		return cookie(c, p.Cookie)
	}
	if v := c.Metadata.Values(p.Metadata); len(v) > 0 {
		return v[0]
	}
	return ""
}

// cookie is the value of set-cookie.
func (p *Sticky) cookie(token string, overTLS bool) string {
	k := http.Cookie{ //nolint:gosec // SameSite follows
		Name: p.Cookie, Value: token, Path: p.Path, HttpOnly: true, Secure: p.Secure || overTLS,
		MaxAge: int(time.Duration(p.MaxAge) / time.Second),
	}
	switch site := p.SameSite; {
	case site == sameSiteStrict:
		k.SameSite = http.SameSiteStrictMode
	case site == sameSiteNone, site == "" && k.Secure:
		// Browsers take SameSite=None from secure cookies only.
		k.SameSite, k.Secure = http.SameSiteNoneMode, true
	default:
		k.SameSite = http.SameSiteLaxMode
	}
	return k.String()
}

var (
	_ Policy                = (*Sticky)(nil)
	_ Binding               = (*Sticky)(nil)
	_ Prioritized           = (*Sticky)(nil)
	_ HealthWatcher         = (*Sticky)(nil)
	_ LoadReportReceiver    = (*Sticky)(nil)
	_ Annotator             = (*sticky)(nil)
	_ Interested            = (*sticky)(nil)
	_ caddy.Provisioner     = (*Sticky)(nil)
	_ caddy.Validator       = (*Sticky)(nil)
	_ caddyfile.Unmarshaler = (*Sticky)(nil)
)
