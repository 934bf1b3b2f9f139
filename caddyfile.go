package grpcproxy

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"

	"github.com/caddygrpc/caddy-grpc-proxy/discovery"
	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() {
	httpcaddyfile.RegisterHandlerDirective("grpc_proxy", parseCaddyfile)
	httpcaddyfile.RegisterDirectiveOrder("grpc_proxy", httpcaddyfile.Before, "reverse_proxy")
}

func parseCaddyfile(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	g := new(Handler)
	if err := g.UnmarshalCaddyfile(h.Dispenser); err != nil {
		return nil, err
	}
	return g, nil
}

// UnmarshalCaddyfile sets up the handler from Caddyfile tokens. Words that reverse_proxy has mean the same here, so
// that a block written for it can be renamed. Syntax:
//
//	grpc_proxy [<matcher>] [<upstreams...>] {
//	    # upstreams
//	    to <upstreams...>
//	    dynamic <source> [<options...>]
//	    group <name>
//
//	    # load balancing
//	    lb_policy       <name> [<options...>]
//	    lb_retries      <retries>
//	    lb_try_duration <duration>
//	    lb_try_interval <interval>
//
//	    # health, asked for
//	    health_check            grpc|tcp|http|off
//	    health_mode             auto|watch|check
//	    health_services         <names...>
//	    health_port             <port>
//	    health_interval         <duration>
//	    health_timeout          <duration>
//	    health_passes           <n>
//	    health_fails            <n>
//	    health_initial          connecting|healthy
//	    health_unimplemented    healthy|unhealthy
//	    health_headers {
//	        <field> <values...>
//	    }
//	    health_jitter                  <percent>|off
//	    health_fast_interval           <duration>
//	    health_unhealthy_interval      <duration>
//	    health_unhealthy_edge_interval <duration>
//	    health_healthy_edge_interval   <duration>
//	    health_no_traffic_interval     <duration>
//	    health_end_hung_calls
//	    health_authority               <authority>
//	    health_version                 1.1|2
//	    health_uri              <uri>
//	    health_method           <method>
//	    health_request_body     <body>
//	    health_status           <status>
//	    health_body             <regexp>
//	    health_follow_redirects
//
//	    # health, seen from calls
//	    fail_duration           <duration>
//	    max_fails               <n>
//	    unhealthy_status        <codes...>
//	    unhealthy_latency       <duration>
//	    deadline_failure_after  <duration>
//	    unhealthy_request_count <n>
//	    outlier_detection {
//	        consecutive_failures       <n>|off
//	        consecutive_local_failures <n>|off
//	        interval                   <duration>
//	        base_ejection_time         <duration>
//	        max_ejection_time          <duration>
//	        max_ejection_time_jitter   <duration>
//	        max_ejection_percent       <n>
//	        ignore_health_checks
//	        success_rate {
//	            stdev_factor           <n>
//	            minimum_hosts          <n>
//	            request_volume         <n>
//	            enforcement_percentage <n>
//	        }
//	        failure_percentage {
//	            threshold              <n>
//	            minimum_hosts          <n>
//	            request_volume         <n>
//	            enforcement_percentage <n>
//	        }
//	        latency {
//	            factor                 <n>
//	            minimum_difference     <duration>
//	            minimum_hosts          <n>
//	            request_volume         <n>
//	            enforcement_percentage <n>
//	        }
//	    }
//	    panic_threshold         <percent>
//	    slow_start              <window> {
//	        aggression         <n>
//	        min_weight_percent <n>
//	    }
//
//	    # deadlines and streams
//	    max_timeout         <duration>
//	    stream_timeout      <duration>
//	    stream_idle_timeout <duration>
//	    stream_close_delay  <duration>
//	    drain_timeout       <duration>
//	    exit_timeout        <duration>
//	    stream_memory_limit <size>
//	    cancel_budget       <n>|off
//	    cancel_window       <duration>
//
//	    # metadata
//	    header_up       [+|-]<field> [<value|regexp> [<replacement>]]
//	    header_down     [+|-]<field> [<value|regexp> [<replacement>]]
//	    trusted_proxies [private_ranges] <ranges...>
//	    max_metadata_bytes  <size>
//	    max_metadata_fields <n>
//
//	    # what clients and logs are told
//	    expose_upstream
//	    verbose_logs
//
//	    # connections to the upstreams; all these words may also stand in a block `transport http { ... }`
//	    tls
//	    tls_server_name <name>
//	    tls_trust_pool  <module> { ... }
//	    tls_client_auth <automate_name> | <cert_file> <key_file>
//	    tls_insecure_skip_verify
//	    tls_timeout       <duration>
//	    tls_renegotiation never|once|freely
//	    tls_curves        <curves...>
//	    tls_except_ports  <ports...>
//	    dial_timeout         <duration>
//	    dial_fallback_delay  <duration>
//	    local_address        <ip>[:<port>]
//	    resolvers            <addresses...>
//	    proxy_protocol       v1|v2
//	    min_conns            <n>
//	    max_conns            <n>
//	    max_streams_per_conn <n>
//	    max_conn_age         <duration>
//	    max_response_header  <size>
//	    queue_size           <n>
//	    queue_full_status    unavailable|resource_exhausted
//	    keepalive            <idle_timeout>|off
//	    keepalive {
//	        interval     <duration>|off
//	        timeout      <duration>
//	        idle_timeout <duration>|off
//	        permit_without_streams
//	    }
//	}
func (h *Handler) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume the directive's name
	p := parser{Dispenser: d, h: h}
	for _, arg := range d.RemainingArgs() {
		if err := p.upstream(arg); err != nil {
			return err
		}
	}
	for d.NextBlock(0) {
		if err := p.subdirective(); err != nil {
			return err
		}
	}
	return p.finishHealth()
}

// parser reads one grpc_proxy block.
type parser struct {
	*caddyfile.Dispenser
	h *Handler

	first  string // the first upstream, whose scheme the others must share
	scheme upstream.Scheme
	words  healthWords
}

func (p *parser) subdirective() error {
	h := p.h
	switch word := p.Val(); word {
	case "group":
		if err := p.text(&h.Group); err != nil {
			return err
		}
		if err := checkGroup(h.Group); err != nil {
			return p.WrapErr(err)
		}
		return nil
	case "to":
		args := p.RemainingArgs()
		if len(args) == 0 {
			return p.ArgErr()
		}
		for _, arg := range args {
			if err := p.upstream(arg); err != nil {
				return err
			}
		}
		return nil
	case "dynamic":
		return p.dynamic()
	case "lb_policy":
		return p.policy()
	case "lb_retries":
		return p.retries()
	case "lb_try_duration":
		return p.durationOrZero(&p.balancing().TryDuration)
	case "lb_try_interval":
		return p.duration(&p.balancing().TryInterval)
	case "max_timeout":
		return p.duration(&h.MaxTimeout)
	case "stream_timeout":
		return p.durationOrZero(&h.StreamTimeout)
	case "stream_idle_timeout":
		return p.duration(&h.StreamIdleTimeout)
	case "stream_close_delay":
		return p.durationOrZero(&h.StreamCloseDelay)
	case "drain_timeout":
		return p.duration(&h.DrainTimeout)
	case "exit_timeout":
		return p.duration(&h.ExitTimeout)
	case "stream_memory_limit":
		return p.sizeUpTo(&h.StreamMemoryLimit, 1<<40, "1TiB", "256MiB")
	case "cancel_budget":
		return p.integerOrOff(&h.CancelBudget)
	case "cancel_window":
		return p.duration(&h.CancelWindow)
	case "max_metadata_bytes":
		return p.size(&h.MaxMetadataBytes)
	case "max_metadata_fields":
		return p.integer(&h.MaxMetadataFields)
	case "expose_upstream":
		return p.flag(&h.ExposeUpstream)
	case "verbose_logs":
		return p.flag(&h.VerboseLogs)
	case "trusted_proxies":
		return p.trustedProxies()
	case "header_up":
		return p.headerUp()
	case "header_down":
		return p.headerDown()
	case "transport":
		return p.transportBlock()
	}
	if known, err := p.transportWord(); known {
		return err
	}
	if known, err := p.healthWord(); known {
		return err
	}
	return p.otherWord()
}

// upstream adds an upstream. An address that has no placeholder is checked right here, where the error can name the
// line.
func (p *parser) upstream(addr string) error {
	scheme, known := schemeOf(addr)
	switch {
	case !hasPlaceholder(addr):
		var err error
		if scheme, err = checkUpstream(addr); err != nil {
			return p.WrapErr(err)
		}
	case isTarget(addr):
		scheme = upstream.SchemeNone
	}
	switch {
	case !known: // Provision compares the schemes when it knows them all
	case p.first == "":
		p.first, p.scheme = addr, scheme
	case scheme != p.scheme:
		return p.WrapErr(schemeConflict(p.first, addr))
	}
	p.h.Upstreams = append(p.h.Upstreams, &Upstream{Dial: addr})
	return nil
}

func (p *parser) balancing() *LoadBalancing {
	if p.h.LoadBalancing == nil {
		p.h.LoadBalancing = new(LoadBalancing)
	}
	return p.h.LoadBalancing
}

// retries reads lb_retries. reverse_proxy's 0 means no retries, or no limit beside lb_try_duration, which is too different
// to be taken for the same.
func (p *parser) retries() error {
	if p.CountRemainingArgs() == 1 {
		if p.NextArg(); p.Val() == "0" {
			return p.Errf(`lb_retries: the least is 1; leave the line out to try all upstreams (only calls that none has processed are tried again)`)
		}
		p.Prev()
	}
	return p.integer(&p.balancing().Retries)
}

func (p *parser) policy() error {
	if !p.NextArg() {
		return p.ArgErr()
	}
	lb := p.balancing()
	if lb.SelectionPolicyRaw != nil {
		return p.Err("lb_policy is given twice; a handler has one policy")
	}
	name := p.Val()
	policy, err := guest[selection.Policy](p, "http.grpc_proxy.selection_policies", "selection policy")
	if err != nil {
		return err
	}
	lb.SelectionPolicyRaw = caddyconfig.JSONModuleObject(policy, "policy", name, nil)
	return nil
}

func (p *parser) dynamic() error {
	if !p.NextArg() {
		return p.ArgErr()
	}
	if p.h.DynamicUpstreamsRaw != nil {
		return p.Err("dynamic is given twice; `dynamic multi { ... }` joins several sources")
	}
	name := p.Val()
	src, err := guest[discovery.Source](p, "http.grpc_proxy.discovery", "source of upstreams")
	if err != nil {
		return err
	}
	p.h.DynamicUpstreamsRaw = caddyconfig.JSONModuleObject(src, "source", name, nil)
	return nil
}

// guest reads a module whose name in the namespace is the current token.
func guest[T any](p *parser, namespace, what string) (T, error) {
	var none T
	id := namespace + "." + p.Val()
	if _, err := caddy.GetModule(id); err != nil {
		return none, p.Errf("there is no %s %q; available: %s", what, p.Val(), modulesBelow(namespace))
	}
	mod, err := caddyfile.UnmarshalModule(p.Dispenser, id)
	if err != nil {
		return none, err
	}
	m, ok := mod.(T)
	if !ok {
		return none, p.Errf("module %s (%T) is not a %s", id, mod, what)
	}
	return m, nil
}

func (p *parser) trustedProxies() error {
	args := p.RemainingArgs()
	if len(args) == 0 {
		return p.ArgErr()
	}
	for _, arg := range args {
		if arg == "private_ranges" {
			p.h.TrustedProxies = append(p.h.TrustedProxies, caddyhttp.PrivateRangesCIDR()...)
			continue
		}
		p.h.TrustedProxies = append(p.h.TrustedProxies, arg)
	}
	return nil
}

func (p *parser) headers() *headers.Handler {
	if p.h.Headers == nil {
		p.h.Headers = new(headers.Handler)
	}
	return p.h.Headers
}

func (p *parser) headerUp() error {
	hd := p.headers()
	if hd.Request == nil {
		hd.Request = new(headers.HeaderOps)
	}
	return p.headerOp(hd.Request)
}

func (p *parser) headerDown() error {
	hd := p.headers()
	if hd.Response == nil {
		hd.Response = &headers.RespHeaderOps{HeaderOps: new(headers.HeaderOps)}
	}
	return p.headerOp(hd.Response.HeaderOps)
}

func (p *parser) headerOp(ops *headers.HeaderOps) error {
	var (
		word        = p.Val()
		args        = p.RemainingArgs()
		value       string
		replacement *string
	)
	switch len(args) {
	case 3:
		replacement = &args[2]
		fallthrough
	case 2:
		value = args[1]
	case 1:
	default:
		return p.ArgErr()
	}
	if err := headers.CaddyfileHeaderOp(ops, args[0], value, replacement); err != nil {
		return p.WrapErr(err)
	}
	if err := checkHeaderOps(ops); err != nil {
		return p.Errf("%s: %w", word, err)
	}
	return nil
}

// otherWord answers for words that are not this directive's.
func (p *parser) otherWord() error {
	word := p.Val()
	switch word {
	case "flush_interval", "request_buffers", "response_buffers", "stream_buffer_size":
		p.noEffect("nothing here waits for a buffer to fill")
		return nil
	case "handle_response", "replace_status", "copy_response", "copy_response_headers":
		return p.Errf("%s works on HTTP answers, which gRPC's are not; use routes with the grpc matcher and grpc_respond in front", word)
	case "rewrite", "method":
		return p.Errf("%s has no place in gRPC: the path names the RPC, and the method is POST", word)
	case "proxy_status_name":
		return p.Errf("%s is about HTTP statuses, which gRPC leaves at 200", word)
	case "lb_retry_match":
		return p.Errf("retries by request or status are not available yet; a call that no upstream has processed is always tried elsewhere")
	}
	return p.Errf("unrecognized subdirective %q", word)
}

// duration reads the single argument of a duration option.
func (p *parser) duration(v *caddy.Duration) error {
	name, arg, err := p.one()
	if err != nil {
		return err
	}
	dur, err := caddy.ParseDuration(arg)
	if err != nil {
		return p.Errf("%s: %q is not a duration; write 30s or 5m, say", name, arg)
	}
	if dur <= 0 {
		return p.Errf("%s: %q is not positive; leave the line out for the default", name, arg)
	}
	*v = caddy.Duration(dur)
	return nil
}

// noEffect warns of a word of reverse_proxy's that does nothing here.
func (p *parser) noEffect(why string) {
	caddy.Log().Named("caddyfile").Warn(fmt.Sprintf("%s:%d: %s has no effect in grpc_proxy: %s", p.File(), p.Line(), p.Val(), why))
	p.RemainingArgs()
}

// durationOrZero reads a duration option of reverse_proxy's whose default is 0, which may be written there.
func (p *parser) durationOrZero(v *caddy.Duration) error {
	if p.CountRemainingArgs() == 1 {
		p.NextArg()
		if d, err := caddy.ParseDuration(p.Val()); err == nil && d == 0 {
			*v = 0
			return nil
		}
		p.Prev()
	}
	return p.duration(v)
}

// durationOrOff reads a duration option for which "off" stands for a negative duration.
func (p *parser) durationOrOff(v *caddy.Duration) error { return orOff(p, v, p.duration) }

// integerOrOff reads a whole number for which "off" stands for a negative one.
func (p *parser) integerOrOff(v *int) error { return orOff(p, v, p.integer) }

// orOff reads an option that may be "off", or what read reads.
func orOff[T ~int | ~int64](p *parser, v *T, read func(*T) error) error {
	if p.CountRemainingArgs() == 1 {
		name := p.Val()
		switch p.NextArg(); p.Val() {
		case "off":
			*v = -1
			return nil
		case "0", "0s":
			return p.Errf("%s: write off to turn it off, or leave the line out for the default", name)
		}
		p.Prev()
	}
	return read(v)
}

// percentOrOff is integerOrOff for a percentage.
func (p *parser) percentOrOff(v *int) error { return orOff(p, v, p.percent) }

func (p *parser) integer(v *int) error { return p.wholeNumber(v, "") }

// percent reads a whole number that may have a % behind it.
func (p *parser) percent(v *int) error { return p.wholeNumber(v, "%") }

func (p *parser) wholeNumber(v *int, unit string) error {
	name, arg, err := p.one()
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(strings.TrimSuffix(arg, unit))
	if err != nil || n <= 0 {
		return p.Errf("%s: %q is not a positive whole number; leave the line out for the default", name, arg)
	}
	*v = n
	return nil
}

func (p *parser) flag(v *bool) error {
	if p.NextArg() {
		return p.ArgErr()
	}
	*v = true
	return nil
}

// one reads the single argument of a word. If a word is given more than once, the last one wins, so that a block can change
// what a snippet in it has set.
func (p *parser) one() (name, arg string, err error) {
	name = p.Val()
	arg, err = p.single()
	return name, arg, err
}

// single reads exactly one argument.
func (p *parser) single() (string, error) {
	args := p.RemainingArgs()
	if len(args) != 1 {
		return "", p.ArgErr()
	}
	return args[0], nil
}

func (p *parser) twice(name string) error {
	return p.Errf("%s is given twice; a handler has one", name)
}

// Interface guards
var (
	_ caddyfile.Unmarshaler = (*Handler)(nil)
)
