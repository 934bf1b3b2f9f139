package grpcproxy

import (
	"reflect"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/types/ref"
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// CELLibrary lets CEL expressions use the matcher, with names in the short form of the Caddyfile. Example:
//
//	expression grpc('users.*', 'orders.v1.Orders/Get') && !remote_ip('10.0.0.0/8')
func (MatchGRPC) CELLibrary(caddy.Context) (cel.Library, error) {
	const function = "grpc_request_list"
	lib, err := caddyhttp.CELMatcherImpl("grpc", function, []*cel.Type{cel.ListType(cel.StringType)},
		func(data ref.Val) (caddyhttp.RequestMatcherWithError, error) {
			names, err := data.ConvertToNative(reflect.TypeFor[[]string]())
			if err != nil {
				return nil, err
			}
			m := new(MatchGRPC)
			m.names(names.([]string))
			return m, m.Validate()
		})
	if err != nil {
		return nil, err
	}
	// Caddy's macros want an argument; here every call matches without one.
	everything := cel.GlobalMacro("grpc", 0, func(eh cel.MacroExprFactory, _ ast.Expr, _ []ast.Expr) (ast.Expr, *common.Error) {
		return eh.NewCall(function, eh.NewIdent(caddyhttp.CELRequestVarName), eh.NewList()), nil
	})
	return caddyhttp.NewMatcherCELLibrary(append(lib.CompileOptions(), cel.Macros(everything)), lib.ProgramOptions()), nil
}
